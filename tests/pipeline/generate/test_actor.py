"""What the actor makes of what the engine says; the jobs of tests/pipeline/run run all of it."""

from __future__ import annotations

from pipeline.commit.schema import Failed
from pipeline.generate.actor import GenerateActor
from specdec.request import INVALID_LOGITS, Completion, Request


def test_a_row_that_went_wrong_in_the_engine_keeps_its_class() -> None:
    actor = object.__new__(GenerateActor)
    for kind in (INVALID_LOGITS, "InvalidRequest"):
        done = Completion("a", 3, (), "error", error="why", error_class=kind)
        failed = actor._outcome(Request("a", (1, 2, 3)), done)
        assert isinstance(failed, Failed)
        assert (failed.error.error_class, failed.error.message) == (kind, "why")
