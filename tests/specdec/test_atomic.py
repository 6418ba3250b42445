from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from specdec.atomic import atomic_file, atomic_folder, write_bytes

Writer = Callable[[Path], AbstractContextManager[Path]]


@contextmanager
def file_in_a_folder(target: Path) -> Iterator[Path]:
    """`atomic_folder`, seen through the one file of the folder."""
    with atomic_folder(target.parent) as fresh:
        yield fresh / target.name


@pytest.fixture(params=["file", "folder"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def target(kind: str, tmp_path: Path) -> Path:
    """A file, itself what is written or the only one in the folder that is."""
    return tmp_path / "model" if kind == "file" else tmp_path / "model" / "weights"


@pytest.fixture
def writer(kind: str) -> Writer:
    return atomic_file if kind == "file" else file_in_a_folder


def test_nothing_is_there_until_all_is(target: Path, writer: Writer, tmp_path: Path) -> None:
    with writer(target) as fresh:
        fresh.write_text("half of it, ")
        assert not (tmp_path / "model").exists()
        with fresh.open("a") as file:
            file.write("the other half")
    assert target.read_text() == "half of it, the other half"
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_a_writer_that_raises_leaves_nothing(target: Path, writer: Writer, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), writer(target) as fresh:
        fresh.write_text("half of it")
        raise OSError("disk full")
    assert not list(tmp_path.iterdir())


DIES = """
import os, sys
from pathlib import Path
from specdec.atomic import atomic_file, atomic_folder
kind, name = sys.argv[1:]
with (atomic_file if kind == "file" else atomic_folder)(Path(name)) as fresh:
    (fresh if kind == "file" else fresh / "weights").write_text("half of it")
    os._exit(9)
"""


def test_a_writer_that_dies_is_in_nobodys_way(
    kind: str, target: Path, writer: Writer, tmp_path: Path
) -> None:
    place = tmp_path / "model"
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", DIES, kind, str(place)]).returncode == 9
    assert not place.exists()
    with writer(target) as fresh:
        fresh.write_text("all of it")
    assert target.read_text() == "all of it"


def test_a_file_stays_as_it_was_if_its_next_writer_dies(tmp_path: Path) -> None:
    place = tmp_path / "model"
    write_bytes(place, b"before")
    assert subprocess.run([sys.executable, "-c", DIES, "file", str(place)]).returncode == 9
    assert place.read_bytes() == b"before"


@pytest.mark.parametrize("writers", [2, 8])
def test_writers_at_the_same_time_do_not_mix(
    kind: str, target: Path, writer: Writer, writers: int, tmp_path: Path
) -> None:
    """Each writes in turns with the others; all meet again before and after they rename."""
    together = threading.Barrier(writers, timeout=60)
    failed: list[BaseException] = []

    def write(letter: str) -> None:
        try:
            with writer(target) as fresh, fresh.open("w") as file:
                for _ in range(100):
                    together.wait()
                    file.write(1000 * letter)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(chr(ord("a") + n),)) for n in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    text = target.read_text()
    assert text == 100_000 * text[0]
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_the_last_file_wins_and_the_first_folder(
    kind: str, target: Path, writer: Writer, tmp_path: Path
) -> None:
    with writer(target) as slow:
        slow.write_text("slow")
        with writer(target) as fast:
            fast.write_text("fast")
        assert target.read_text() == "fast"
    assert target.read_text() == ("slow" if kind == "file" else "fast")
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with atomic_folder(tmp_path / "model") as fresh:
        (fresh / "weights").write_text("all of it")
    assert (tmp_path / "model" / "weights").read_text() == "all of it"


def test_a_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(NotADirectoryError), atomic_folder(tmp_path / "model"):
        pass
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_what_is_only_needed_meanwhile_may_lie_beside_a_file(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "library.so") as fresh:
        assert fresh.name == "library.so"
        fresh.with_name("library.o").write_text("object")
        fresh.write_text("library")
    assert [each.name for each in tmp_path.iterdir()] == ["library.so"]


def test_a_file_gets_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_bytes(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode
