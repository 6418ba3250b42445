"""What an actor loads for a job, and the engine that it makes of it."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.job import JobConfig
from pipeline.generate.loading import load_pair, make_engine
from specdec.request import Request, SamplingParams
from tests.conftest import TinyModels


@pytest.mark.parametrize(
    ("policy", "draft", "loaded", "speculates"),
    [
        ("goodput", True, True, True),
        ("goodput", False, False, True),
        ("suffix", True, False, True),
        ("suffix", False, False, True),
        ("none", True, False, False),
    ],
)
def test_a_draft_is_loaded_where_one_is_asked_and_candidates_are_looked_up_without_one(
    tiny_models: TinyModels, policy: str, draft: bool, loaded: bool, speculates: bool
) -> None:
    settings: dict[str, Any] = {
        "input": {"paths": "in.jsonl", "prompt_column": "p"},
        "output": "out",
        "models": {"target": tiny_models.target, "draft": tiny_models.draft if draft else None},
        "speculation": {"policy": policy},
        "actors": {"kv_memory_gb": 0.01, "slots": 2},
    }
    job = JobConfig.model_validate(settings)
    pair = load_pair(job)
    engine = make_engine(job, pair, None)
    assert (pair.draft is not None) == (engine.drafter is not None) == loaded
    assert (engine.drafting is not None) == loaded
    assert (engine.known is not None) == speculates
    asked = SamplingParams(6, temperature=0.0, ignore_eos=True)
    (done,) = engine.generate([Request("a", (5, 6, 7, 5, 6, 7, 5, 6), asked)])
    assert len(done.output_ids) == 6
