"""GGUF files of a tiny model, stored in several ways, and what becomes of them on disk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from specdec.loading import pair as pair_module
from specdec.loading.conversion import DTYPES, model_folder, tokenizer_folder
from specdec.loading.loader import DType
from specdec.loading.pair import ModelPair
from specdec.loading.sources import PairError, find_model
from specdec.loading.vocabulary import check_tokenizers
from tests.specdec.loading.saved_models import SMOLLM2, saved
from tests.specdec.loading.tiny_gguf import TOKENS, Stored, write_gguf
from tests.specdec.tiny_models import tiny_model

Write = Callable[[Stored], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file; the cache of conversions is empty."""
    monkeypatch.setenv("SPECBATCH_CACHE", str(tmp_path / "cache"))
    return lambda stored: write_gguf(tmp_path / f"{stored}.gguf", stored)


@pytest.fixture
def conversions(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "gguf"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_conversion_has_the_dtype_that_it_was_asked_for(
    stored: Stored, dtype: torch.dtype, write: Write
) -> None:
    source = find_model(str(write(stored)))
    folder = Path(model_folder(source, dtype))
    assert {weight.dtype for weight in weights(folder).values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == dtype


def test_half_the_bytes_and_the_same_weights_rounded_once(write: Write) -> None:
    source = find_model(str(write("Q8_0")))
    full, half = (Path(model_folder(source, d)) for d in (torch.float32, torch.bfloat16))
    assert full != half
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (full, half)]
    assert 0.5 <= sizes[1] / sizes[0] < 0.51
    rounded = weights(half)
    for name, weight in weights(full).items():
        assert torch.equal(rounded[name], weight.bfloat16()), name


def test_float32_has_the_numbers_that_the_file_means_and_the_logits_of_transformers(
    write: Write,
) -> None:
    file = write("Q8_0")
    folder = Path(model_folder(find_model(str(file)), torch.float32))
    (stored,) = (t for t in gguf.GGUFReader(file).tensors if t.name == "token_embd.weight")
    meant = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(weights(folder)["model.embed_tokens.weight"], meant)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens)
        theirs = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )(tokens)
    assert torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_job_writes_its_own_dtype_and_nothing_else(
    dtype: DType, write: Write, conversions: Path
) -> None:
    file = write("Q8_0")
    for _ in range(2):
        pair = ModelPair.load(str(file), dtype=dtype, device="cpu")
        assert pair.target.dtype == getattr(torch, dtype)
        (folder,) = conversions.iterdir()
        assert {weight.dtype for weight in weights(folder).values()} == {pair.target.dtype}
    assert pair.tokenizer.decode(pair.tokenizer("the end").input_ids) == "the end"


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")],
)
def test_auto_takes_the_files_own_dtype_and_bfloat16_if_it_is_quantised(
    stored: Stored, dtype: str, write: Write, conversions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the device is fast in it, as here they all are said to be."""
    plain = pair_module.chosen_dtype
    monkeypatch.setattr(
        pair_module, "chosen_dtype", lambda stored, place: plain(stored, torch.device("cuda"))
    )
    assert ModelPair.load(str(write(stored)), device="cpu").describe()["dtype"] == dtype
    (folder,) = conversions.iterdir()
    assert {str(weight.dtype) for weight in weights(folder).values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("full", [{"deterministic": True}, {"quantization": "int8"}], ids=str)
def test_what_needs_float32_gets_it_whatever_the_file_is_stored_in(
    full: dict[str, object], write: Write, conversions: Path
) -> None:
    ModelPair.load(str(write("BF16")), device="cpu", **full)  # type: ignore[arg-type]
    (folder,) = conversions.iterdir()
    assert folder.name.endswith("-float32")


def test_a_changed_file_is_converted_anew(write: Write, conversions: Path) -> None:
    file = write("F32")
    before = model_folder(find_model(str(file)), torch.float32)
    write_gguf(file, "F32", seed=1)
    after = model_folder(find_model(str(file)), torch.float32)
    assert after != before
    name = "model.embed_tokens.weight"
    assert not torch.equal(weights(Path(after))[name], weights(Path(before))[name])


def test_folders_and_hub_names_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tiny_model())
    assert model_folder(find_model(str(folder)), torch.float32) == str(folder)
    assert tokenizer_folder(find_model(str(folder))) == folder
    assert model_folder(find_model("owner/model@main"), torch.float32) == "owner/model"
    assert tokenizer_folder(find_model("owner/model@main")) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tokenizer_is_read_from_whichever_conversion_is_there(
    dtype: torch.dtype, write: Write, tmp_path: Path
) -> None:
    file = write("Q8_0")
    source = find_model(str(file))
    other = str(saved(tmp_path / "other", tiny_model()))
    assert tokenizer_folder(source) is None
    check_tokenizers(str(file), other)  # too early to tell
    folder = model_folder(source, dtype)
    assert tokenizer_folder(source) == Path(folder)
    check_tokenizers(str(file), str(file))
    with pytest.raises(PairError, match=f"differ at token 0: {TOKENS[0]!r}"):
        check_tokenizers(str(file), other)


def test_a_damaged_file_is_an_error_that_names_it_and_leaves_nothing(
    write: Write, conversions: Path
) -> None:
    file = write("F32")
    file.write_bytes(file.read_bytes()[:3000])
    for dtype in ("auto", "float32"):
        with pytest.raises(PairError, match=str(file)):
            ModelPair.load(str(file), dtype=dtype, device="cpu")
    assert not list(conversions.iterdir())


CONVERT = f"""
import torch; torch.set_num_threads(1)
from specdec.loading.pair import ModelPair
ModelPair.load({SMOLLM2!r}, device="cpu")
"""


@pytest.mark.slow
def test_processes_that_convert_the_same_gguf_at_once_all_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECBATCH_CACHE", str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", CONVERT]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    (converted,) = (tmp_path / "gguf").iterdir()
    assert (converted / "model.safetensors").is_file()
