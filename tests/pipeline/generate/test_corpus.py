"""A job's corpus: made once of earlier outputs, refused where it cannot be; no token changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import layout
from pipeline.config.job import JobConfig
from pipeline.errors import UserError
from pipeline.generate import corpus
from pipeline.generate.corpus import corpus_folders, job_corpus
from pipeline.generate.loading import load_pair, make_engine
from specdec.request import Request, SamplingParams
from tests.conftest import TinyModels

ALL = 1 << 20
"""The models have all tokens of the tokenizer."""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECBATCH_CACHE", str(tmp_path / "cache"))


def wrote(folder: Path, texts: list[str], reason: str = "length") -> str:
    """An output folder of one unit with these completions."""
    rows = {"completion": texts, "finish_reason": [reason] * len(texts)}
    for name in (layout.JOB, layout.completions("0-1")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / layout.JOB).write_text("{}")
    pq.write_table(pa.table(rows), folder / layout.completions("0-1"))
    return str(folder)


def job_of(models: TinyModels, *outputs: str, **speculation: Any) -> JobConfig:
    return JobConfig.model_validate(
        {
            "input": {"paths": "in.jsonl", "prompt_column": "p"},
            "output": "out",
            "models": {"target": models.target},
            "speculation": {"verification": "coupled", "corpus": list(outputs), **speculation},
            "actors": {"kv_memory_gb": 0.01, "slots": 4},
        }
    )


def test_tokens_are_the_same_whatever_earlier_jobs_wrote(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    pair = load_pair(job_of(tiny_models))
    asked = [
        Request(str(i), (5 + i, 6, 7), SamplingParams(24, i % 2, seed=i, ignore_eos=True))
        for i in range(4)
    ]
    plain = make_engine(job_of(tiny_models), pair, None).generate(asked)
    texts = [pair.tokenizer.decode(each.output_ids) for each in plain]
    own, other = wrote(tmp_path / "own", texts), wrote(tmp_path / "other", ["abcabcab"] * 3)
    accepted = []
    for outputs in ([own], [other], [own, other]):
        engine = make_engine(job_of(tiny_models, *outputs, policy="suffix"), pair, None)
        done = engine.generate(asked)
        assert [each.output_ids for each in done] == [each.output_ids for each in plain]
        accepted.append(engine.stats.accepted_in_corpus)
    assert accepted[0] > 0 == accepted[1]


def test_a_machine_makes_it_once_and_keeps_a_few(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_pair(job_of(tiny_models)).tokenizer
    job = job_of(tiny_models, wrote(tmp_path / "a", ["one two three"] * 2, "stop"))
    first = job_corpus(job, tokenizer, ALL)
    assert first is not None and first.tokens == 2 * (len("one two three") + 1)
    with monkeypatch.context() as patch:
        patch.setattr("specdec.drafters.corpus.build_corpus", None)  # it is there
        again = job_corpus(job, tokenizer, ALL)
    assert again is not None and again.tokens == first.tokens
    monkeypatch.setattr(corpus, "KEPT", 2)
    for name in "bcd":
        job_corpus(
            job_of(tiny_models, wrote(tmp_path / name, ["other text " + name])), tokenizer, ALL
        )
    assert len([*(tmp_path / "cache").rglob("*.corpus")]) == 2
    wrote(tmp_path / "a", ["one two three four"])
    (tmp_path / "a" / layout.JOB).write_text(json.dumps({"another": "job"}))
    renewed = job_corpus(job, tokenizer, ALL)
    assert renewed is not None and renewed.tokens == len("one two three four")


def test_folders_without_a_job_or_completions_are_refused(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"speculation\.corpus: .*no job's output here"):
        corpus_folders(job_of(tiny_models, str(tmp_path / "nothing")))
    tokenizer = load_pair(job_of(tiny_models)).tokenizer
    with pytest.raises(UserError, match=r"speculation\.corpus \(.*empty\): there is not one text"):
        job_corpus(job_of(tiny_models, wrote(tmp_path / "empty", [])), tokenizer, ALL)
    assert job_corpus(job_of(tiny_models), tokenizer, ALL) is None


def test_a_file_that_cannot_be_read_is_named(tiny_models: TinyModels, tmp_path: Path) -> None:
    tokenizer = load_pair(job_of(tiny_models)).tokenizer
    job = job_of(tiny_models, wrote(tmp_path / "a", ["one two three"]))
    file = tmp_path / "a" / layout.completions("0-1")
    file.write_bytes(file.read_bytes()[:99])
    with pytest.raises(UserError, match=r"speculation\.corpus: .*0-1\.parquet cannot be read: "):
        job_corpus(job, tokenizer, ALL)


@pytest.mark.parametrize("damaged", [b"", b"{}"])
def test_a_damaged_one_is_made_again(
    tiny_models: TinyModels, tmp_path: Path, damaged: bytes
) -> None:
    tokenizer = load_pair(job_of(tiny_models)).tokenizer
    job = job_of(tiny_models, wrote(tmp_path / "a", ["one two three"]))
    job_corpus(job, tokenizer, ALL)
    (file,) = (tmp_path / "cache").rglob("*.corpus")
    whole = file.read_bytes()
    file.write_bytes(damaged or whole[:-1] + bytes([whole[-1] ^ 1]))
    again = job_corpus(job, tokenizer, ALL)
    assert again is not None and again.tokens == len("one two three")
    assert file.read_bytes() == whole


def test_tokens_that_the_models_do_not_have_are_not_proposed(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    """A tokenizer may have more tokens than its model gives logits for."""
    pair = load_pair(job_of(tiny_models))
    text = "abcdefgh" * 4
    job = job_of(tiny_models, wrote(tmp_path / "a", [text]), policy="suffix")
    tokens = pair.tokenizer(text, add_special_tokens=False).input_ids
    lacking = sorted({*tokens})[-1]
    corpus = job_corpus(job, pair.tokenizer, lacking)
    assert corpus is not None and corpus.tokens == tokens.index(lacking)
    assert job_corpus(job, pair.tokenizer, ALL).tokens == len(tokens)  # type: ignore[union-attr]
