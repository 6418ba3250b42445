from __future__ import annotations

from collections import Counter
from pathlib import Path

import gguf
import pytest
import torch

from specdec.loading.gguf_header import _PLAIN, _Reader, stored_dtype
from tests.specdec.loading.tiny_gguf import Stored, write_gguf


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", None)],
)
def test_a_file_is_stored_in_what_most_of_its_weights_are(
    stored: Stored, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """Norms are in float32 in every file."""
    assert stored_dtype(write_gguf(tmp_path / "model.gguf", stored)) == dtype


def test_the_types_have_the_numbers_that_the_gguf_package_gives_them() -> None:
    for name, dtype in (("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")):
        assert _PLAIN[gguf.GGMLQuantizationType[name]] == getattr(torch, dtype)


def test_a_header_is_read_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", "Q8_0")
    expected: Counter[int] = Counter()
    for tensor in gguf.GGUFReader(file).tensors:
        expected[int(tensor.tensor_type)] += int(tensor.n_elements)
    assert len(expected) == 2
    assert _Reader(file.read_bytes()).numbers_by_type() == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [4, 10, 40, 400, 3000])
def test_a_file_that_was_cut_off_is_an_error(keep: int, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", "F32")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="header is damaged"):
        stored_dtype(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"safetensors", "does not begin"), (b"GGUF" + bytes(40), "version 0"), (b"", "empty")],
)
def test_another_file_is_an_error(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        stored_dtype(tmp_path / "model.gguf")
