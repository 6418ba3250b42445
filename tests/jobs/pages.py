"""A real job whose prompts and file names try to be markup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from jobs.cli import app
from tests.conftest import TinyModels

PLANTED = "<script>document.title='pwned'</script><img src=x onerror=alert(1)> $x_$"


def make_job(root: Path, models: TinyModels, **changes: Any) -> Path:
    """Run it through the command line; ten rows, one error, two input files. Returns its output."""
    prompts: dict[str, list[str | None]] = {
        "plain.jsonl": [f"say {i}" for i in range(6)],
        "<b>&'$x_$.jsonl": [PLANTED, "say", "it", PLANTED, None],
    }
    for name, texts in prompts.items():
        (root / name).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    # A head's policy with an online estimator: it drafts at least one candidate, and predicts.
    speculation = {"policy": "head", "estimator": "confidence", "k_max": 4, "control_share": 0.2}
    job: dict[str, Any] = {
        "name": "markup",
        "input": {"paths": ["*.jsonl"], "prompt_column": "prompt"},
        "output": "out",
        "models": {"target": models.target, "draft": models.target},
        "sampling": {"max_new_tokens": 24, "temperature": 1, "ignore_eos": True},
        "speculation": speculation,
        "actors": {"num_cpus": 2},
        "unit_rows": 3,
        **changes,
    }
    (root / "job.yaml").write_text(yaml.safe_dump(job))
    result = CliRunner().invoke(app, ["run", str(root / "job.yaml"), "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.output == ""
    return root / "out"
