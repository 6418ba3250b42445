"""A distillation's folder: whose it is, what it learns from, and where it stopped.

config.json, model.safetensors  the best draft so far
training.json                   what was done, written last
work/                           until then: plan.json, examples.jsonl, checkpoint.safetensors
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.atomic import atomic_file, write_bytes
from specdec.training.examples import Example, from_lines, to_lines
from specdec.training.settings import DistillError
from specdec.training.student import WEIGHTS

HOW_LONG = ("epochs", "minutes")
"""Arguments that a run which was stopped may be given anew: they say where its schedule ends."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """The folder of a new draft.

    Attributes:
        out: the folder.
    """

    out: Path

    @property
    def work(self) -> Path:
        """What is needed to resume; gone when the draft is done."""
        return self.out / "work"

    @property
    def scores(self) -> Path:
        """Where the target's scores are kept if nowhere else."""
        return self.work / "scores"

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Make sure that the folder is new, or of a run with the same arguments.

        One that is not done may have to go on for longer, or less long, than was said at first.

        Args:
            arguments: plain data; all that changes the result.

        Raises:
            DistillError: it holds something else; the message shows the difference.
        """
        if self.out.exists() and not self.out.is_dir():
            raise DistillError(f"{self.out} is a file, not a folder")
        for record in (self.out / "training.json", self.work / "plan.json"):
            if record.is_file():
                there = json.loads(record.read_text())["arguments"]
                here = json.loads(json.dumps(arguments))
                names = [*there, *(name for name in here if name not in there)]
                free = HOW_LONG if record.parent == self.work else ()
                lines = [
                    f"  {name}: {there.get(name)!r} there, {here.get(name)!r} here"
                    for name in names
                    if name not in free and there.get(name) != here.get(name)
                ]
                if lines:
                    raise DistillError(
                        f"{self.out} was begun with other arguments; choose another folder, or "
                        "restore:\n" + "\n".join(lines)
                    )
                return
        if (self.out / WEIGHTS).exists() or (self.out / "config.json").exists():
            raise DistillError(f"{self.out} holds another model; choose another folder")

    def card(self) -> dict[str, Any] | None:
        """What `finish` wrote, if the draft is done."""
        path = self.out / "training.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def examples(self) -> list[Example] | None:
        """What the run was begun with, if it was begun."""
        path = self.work / "plan.json"
        if not path.is_file():
            return None
        return from_lines((self.work / "examples.jsonl").read_text())

    def begin(self, arguments: Mapping[str, Any], examples: Sequence[Example]) -> None:
        """Take the folder; its plan, written last, says that the examples are complete."""
        self.work.mkdir(parents=True, exist_ok=True)
        write_bytes(self.work / "examples.jsonl", to_lines(examples).encode())
        plan = json.dumps({"arguments": arguments}, indent=2)
        write_bytes(self.work / "plan.json", plan.encode())

    def checkpoint(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Keep tensors and plain data in one atomic step."""
        path = self.work / "checkpoint.safetensors"
        on_host = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        with atomic_file(path) as fresh:
            save_file(on_host, fresh, metadata={"state": json.dumps(state)})

    def resume(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `checkpoint` kept last, or None."""
        path = self.work / "checkpoint.safetensors"
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["state"])

    def finish(self, card: Mapping[str, Any]) -> None:
        """Write the card and remove what was only needed to resume."""
        write_bytes(self.out / "training.json", json.dumps(card, indent=2).encode())
        shutil.rmtree(self.work)
