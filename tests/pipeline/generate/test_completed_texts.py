"""From a row to the text of its completion, with a tokenizer as Llama 2 has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.job import JobConfig
from pipeline.generate.loading import load_pair, make_engine
from pipeline.inputs.requests import RowRequests
from pipeline.texts import Texts
from specdec.request import Completion
from tests.conftest import save_llama
from tests.pipeline.tiny_tokenizers import save_llama_like

PROMPT = "The capital of France is"


def tiny_target(folder: Path, closes: bool) -> str:
    save_llama(folder, save_llama_like(folder, closes), seed=4)
    return str(folder)


def job_of(target: str, **sampling: Any) -> JobConfig:
    return JobConfig.model_validate(
        {
            "input": {"paths": "in.jsonl", "prompt_column": "p"},
            "output": "out",
            "models": {"target": target},
            "sampling": {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True, **sampling},
            "speculation": {"policy": "none"},
            "actors": {"kv_memory_gb": 0.01},
        }
    )


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Completion, str]]:
    """Completes a prompt with a model that speaks of Paris; says its text, too."""
    target = tiny_target(tmp_path_factory.mktemp("models"), closes=True)
    pair = load_pair(job_of(target))
    line = pair.tokenizer("Paris! <|im_start|>user", add_special_tokens=False)["input_ids"]

    def complete(**sampling: Any) -> tuple[Completion, str]:
        job = job_of(target, **sampling)
        (request,) = RowRequests(job.input, job.sampling, pair.tokenizer).of({"p": PROMPT}, "f:0:0")
        engine, begin = make_engine(job, pair, None), len(request.prompt_ids)
        logits = pair.target.logits

        def speaking(hidden: torch.Tensor) -> torch.Tensor:
            made = logits(hidden)
            (row,) = engine.scheduler.rows
            made[:, line[(len(row.tokens) - begin) % len(line)]] += 1e4
            return made

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pair.target, "logits", speaking)
            (done,) = engine.generate([request])
        return done, Texts(pair.tokenizer).completion(request, done)

    return complete


def test_the_text_begins_with_its_space(complete: Callable[..., tuple[Completion, str]]) -> None:
    done, text = complete(max_new_tokens=10)
    assert (done.finish_reason, text) == ("length", " Paris!  ")
    assert len(done.output_ids) == 10


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (" Paris", "", 6),
        ("!", " Paris", 7),
        ("<|im_start|>", " Paris! ", 9),
        ("<|im_start|> user", " Paris! ", 14),
        ("im_start", " Paris! ", 9),
        ("user Paris", " Paris!  ", 20),
    ],
)
def test_a_stop_string_ends_the_text(
    complete: Callable[..., tuple[Completion, str]], stop: str, text: str, tokens: int
) -> None:
    done, found = complete(stop=[stop])
    assert (done.finish_reason, found, len(done.output_ids)) == ("stop", text, tokens)


def test_a_tokenizer_that_appends_an_end_of_sequence(tmp_path: Path) -> None:
    job = job_of(tiny_target(tmp_path, closes=True), max_new_tokens=8)
    pair = load_pair(job)
    asked = RowRequests(job.input, job.sampling, pair.tokenizer, pair.context_length)
    prompts = ["hi", "<s>hi", "\n<s>hi", "say hi"]
    requests = [each for i, p in enumerate(prompts) for each in asked.of({"p": p}, f"in:{i}:0")]
    # A beginning of sequence, a space, and a token for each letter.
    assert [len(request.prompt_ids) for request in requests] == [4, 4, 6, 8]
    done = make_engine(job, pair, None).generate(requests)
    assert all(len(each.output_ids) == 8 for each in done)
    texts = [Texts(pair.tokenizer).completion(*each) for each in zip(requests, done, strict=True)]
    assert all(texts)
    assert texts[0] == texts[1]
