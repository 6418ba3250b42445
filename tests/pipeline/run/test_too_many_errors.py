"""A job that is stopped early, since most of the rows that it has begun failed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.job import S3Config
from pipeline.errors import TooManyErrors
from pipeline.observe import error_share
from pipeline.observe.ledger import read_ledger
from pipeline.outputs.verify import verify
from pipeline.storage.folder import open_folder
from tests.conftest import TinyModels
from tests.pipeline.small_jobs import rows_of, run, settings

pytestmark = pytest.mark.ray

ROWS = 384
"""So many that the job is far from its end when somebody looks at it."""


class BegunAgain(Exception):
    """A run has come so far that it asks for a Ray."""


def test_a_job_that_fails_most_of_its_first_rows_is_stopped_and_can_go_on(
    local_ray: None,
    tiny_models: TinyModels,
    tmp_path: Path,
    write_rows: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(error_share, "LEAST_ROWS", 12)
    rows: list[dict[str, Any]] = [
        {"prompt": "say it" if i % 4 == 0 else None, "i": i} for i in range(ROWS)
    ]
    output = tmp_path / "out"
    values = settings(tiny_models, write_rows("in.jsonl", rows), output)
    values |= {"input": {"paths": [str(tmp_path / "in.jsonl")], "prompt_column": "prompt"}}
    values["sampling"] |= {"max_new_tokens": 200, "ignore_eos": True}
    with pytest.raises(
        TooManyErrors, match=r"failed, more than .* NullPrompt .* in\.jsonl:1:0: "
    ) as stop:
        run(values)
    assert stop.value.missing
    assert f"{stop.value.missing} units are not generated" in str(stop.value)
    first = rows_of(output)
    assert 0 < len(first) < ROWS // 4
    assert [each.end for each in read_ledger(open_folder(str(output), S3Config()))] == ["errors"]

    def begin() -> None:
        raise BegunAgain

    monkeypatch.setattr("pipeline.run.run.connected", begin)
    with pytest.raises(TooManyErrors):
        run(values)  # what it was stopped for is still so
    with pytest.raises(BegunAgain):
        run({**values, "max_error_share": 0.75})
    assert rows_of(output) == first
    found = verify(str(output), S3Config())
    assert {problem.kind for problem in found.problems} == {"missing", "unfinished"}
