from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from jobs.cli import app
from tests.conftest import TinyModels

WriteJob = Callable[..., str]
STAGES = ("loading models", "reading rows", "evaluating")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["distill", *map(str, arguments)])


def one_error(result: Result) -> str:
    """The error message of a run that failed as it should: no traceback, code 2."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    before, error, message = result.stderr.partition("error: ")
    assert error
    # Nothing else but what was done until then, and how many rows there are.
    for line in before.splitlines():
        assert line.split(" · ")[0] in STAGES or line.endswith(" output tokens"), line
    return message.strip()


@pytest.fixture
def output(write_job_output: WriteJob) -> str:
    """A job's output: thirty completions of letters."""
    draw = random.Random(0)
    rows = [
        {
            "row_id": f"in.parquet:{i}:0",
            "prompt": f"say {i}",
            "kind": "even" if i % 2 == 0 else "odd",
            "completion": "".join(draw.choices("abc ", k=12)),
            "finish_reason": "stop",
        }
        for i in range(30)
    ]
    return write_job_output({"a": rows[:20], "b": rows[20:]})


QUICK = ("--epochs", 2, "--held-out", 0.3, "--batch-tokens", 200, "--threads", 1)


def test_distill_then_again_then_improve(
    output: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    arguments = (output, "--out", made, "--from-layers", "0", *QUICK, "--by", "kind")
    result = call(*arguments, "--compare", tiny_models.draft)
    assert result.exit_code == 0, result.output
    assert "30 rows, 390 output tokens" in result.stderr
    assert "sample at 100%" in result.stderr
    assert "scoring 100%" in result.stderr
    assert "incumbent" in result.stdout
    assert all(group in result.stdout for group in ("all", "even", "odd"))
    assert f"Draft: {made}" in result.stdout
    card = json.loads((made / "training.json").read_text())
    assert card["arguments"]["outputs"] == [output]
    assert card["student"] == "layers 0 of the target"
    assert card["target"]["digest"]
    assert card["versions"]["torch"]
    assert set(card["held_out"]) == {"start", "incumbent", "result"}

    again = call(*arguments)
    assert again.exit_code == 0
    assert "Nothing was missing" in again.stdout
    refused = one_error(call(*arguments, "--lr", "1e-4"))
    assert "begun with other arguments" in refused
    assert "lr: 0.0005 there, 0.0001 here" in refused

    eagle = tmp_path / "eagle"
    kind = ("--kind", "eagle3", "--draft-vocab", 20, "--compare", made)
    result = call(output, "--out", eagle, *kind, *QUICK)
    assert result.exit_code == 0, result.output
    config = json.loads((eagle / "config.json").read_text())
    assert (config["speculators_model_type"], config["draft_vocab_size"]) == ("eagle3", 20)
    assert config["speculators_config"]["verifier"]["name_or_path"] == tiny_models.target
    found = json.loads((eagle / "training.json").read_text())["held_out"]
    there = card["held_out"]["result"]["all"]["sampled_length"]
    assert found["incumbent"]["all"]["sampled_length"] == pytest.approx(there, abs=0.01)
    better = (output, "--out", tmp_path / "again", "--draft", eagle, *kind[:2], *QUICK)
    assert call(*better).exit_code == 0

    scores = tmp_path / "scores"
    better = ("--draft", made, "--scores", scores, "--limit", 25, *QUICK)
    result = call(output, output, "--out", tmp_path / "better", *better)
    assert result.exit_code == 0, result.output
    assert "25 rows" in result.stderr
    assert list(scores.iterdir())
    result = call(output, output, "--out", tmp_path / "other", *better, "--seed", 1)
    assert result.exit_code == 0
    assert "scoring" not in result.stderr


def test_mistakes(
    output: str,
    write_job_output: WriteJob,
    tiny_models: TinyModels,
    tmp_path: Path,
) -> None:
    other = write_job_output({}, name="other", target=tiny_models.draft)
    out = ("--out", tmp_path / "new")
    mistakes: list[tuple[tuple[object, ...], str]] = [
        ((tmp_path, *out), "no job's output here"),
        ((output, *out, "--from-layers", "0", "--draft", "x"), "not both"),
        ((output, *out, "--from-layers", "0", "--kind", "eagle3"), "leave it out"),
        ((output, *out, "--draft", tiny_models.draft, "--kind", "eagle3"), "is not of EAGLE-3"),
        ((output, *out, "--from-layers", "zero"), "write layer numbers as 0,29"),
        ((output, *out, "--from-layers", "7"), "layers 7: the target has 2, 0 to 1"),
        ((output, *out, "--draft", "./gone"), "./gone: no such folder"),
        ((output, *out, "--compare", tiny_models.other_vocabulary), "vocabularies differ"),
        ((output, *out, "--epochs", 0), "epochs must be at least 1"),
        ((output, *out, "--endpoint", "nowhere"), "--endpoint:"),
        ((output, *out, "--by", "sort"), "no column 'sort'"),
        ((output, other, *out), "other targets"),
        ((other, *out, "--from-layers", "0"), "has not committed a completion yet"),
        ((output, "--out", tiny_models.draft), "holds another model"),
        ((output, *out, "--limit", 1), "of 1 examples"),
    ]
    for arguments, message in mistakes:
        assert message in one_error(call(*arguments)), arguments
        # Nothing is begun in vain: another try with other arguments is free.
        assert not (tmp_path / "new" / "work").exists(), arguments


def test_a_target_that_has_changed(
    write_job_output: WriteJob, output: str, tmp_path: Path, tiny_models: TinyModels
) -> None:
    file = Path(output, "_specbatch/job.json")
    record: dict[str, Any] = json.loads(file.read_text())
    record["fingerprint"]["models"]["target"]["digest"] = "0"
    file.write_text(json.dumps(record))
    message = one_error(call(output, "--out", tmp_path / "new", *QUICK))
    assert f"give --target {tiny_models.target} to use it all the same" in message
    given = ("--target", tiny_models.target)
    assert call(output, "--out", tmp_path / "new", *QUICK, *given).exit_code == 0


def test_a_quantised_target_is_refused_before_anything_is_trained(
    output: str, tiny_models: TinyModels, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantised = tmp_path / "quantised"
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        tiny_models.target, quantization_config=four_bits
    ).save_pretrained(quantised)
    AutoTokenizer.from_pretrained(tiny_models.target).save_pretrained(quantised)
    message = one_error(call(output, "--out", tmp_path / "new", "--target", quantised, *QUICK))
    assert message == (
        f"target {quantised}: its layers stay quantised by bitsandbytes and cannot be trained; "
        "give --kind eagle3, or --draft with a model that is not quantised"
    )
    assert not (tmp_path / "new").exists()


def test_help_has_examples() -> None:
    result = call("--help")
    assert result.exit_code == 0
    assert "specbatch distill out/questions" in result.stdout
