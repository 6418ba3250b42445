"""RAY_ADDRESS, before Ray is told of it. What a real cluster says: tests/jobs/cluster."""

from __future__ import annotations

import pytest

from pipeline.errors import UserError
from pipeline.run.ray_address import find_cluster
from pipeline.run.ray_session import _short_folder
from tests.conftest import free_port


@pytest.mark.parametrize("address", ["", " ", "local"])
def test_without_an_address_a_local_ray_is_started(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert find_cluster() is None


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "http:// is an address of a dashboard; write HEAD:6379"),
        ("ray://127.0.0.1:10001", "ray:// is an address of a Ray Client, through which no job"),
        ("redis://a:1", "redis:// is an address of no Ray"),
        ("nonsense", "'nonsense' is no address; write HEAD:6379"),
        ("head:", "no address"),
        ("head:99999", "no address"),
        ("127.0.0.1:PORT", "no Ray cluster at 127.0.0.1:.*: Connection refused; does it run"),
        (f"{'x' * 70}.invalid:6379", "no Ray cluster at x"),
    ],
)
def test_an_address_of_no_ray_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address.replace("PORT", str(free_port())))
    with pytest.raises(UserError, match=f"RAY_ADDRESS: .*{message}"):
        find_cluster()


def test_ray_gets_a_folder_whose_sockets_have_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/scratch/me")
    assert _short_folder() is None
    monkeypatch.setenv("TMPDIR", f"/scratch/{'deep/' * 12}")
    assert _short_folder() == "/tmp/ray"
