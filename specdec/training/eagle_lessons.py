"""What an EAGLE-3 draft learns from: the target's hidden states and distributions, as it goes.

They are computed when a step needs them and kept in memory while there is room, for the epochs that
follow: those of a token take 3 KB with a target of 135 million weights, and 25 KB with one of 8
billion. They are written only where a folder is given, for other runs; these may write to it, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.atomic import atomic_file
from specdec.model.decoder import PackedDecoder
from specdec.training.examples import Example
from specdec.training.scores import LOGIT_ROWS, lengths_of, output_positions, read_states

_FORMAT = 1
"""Part of every lesson's name: raised when their content changes, so that old ones go unused."""

KEPT_BYTES = 3 << 30
"""Most memory for lessons that are kept.

Raised, later epochs read less again with the target; lowered, more fits beside.
"""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a step learns from.

    Attributes:
        states: [N, layers * hidden], the target's hidden states of the examples' tokens.
        ids: int64 [n, k], places in the draft's vocabulary of the target's likeliest tokens at the
            n output positions.
        probs: float32 [n, k], their probabilities among the tokens that the draft knows.
    """

    states: Tensor
    ids: Tensor
    probs: Tensor

    @property
    def bytes(self) -> int:
        """Of memory."""
        return sum(each.nbytes for each in (self.states, self.ids, self.probs))


class EagleLessons:
    """Lessons of a list of examples.

    Args:
        target: reads the examples.
        examples: the list.
        layers: the target's layers whose inputs count.
        known: int64 [draft vocabulary], which of the target's tokens count.
        top_k: how many of them are told apart.
        folder: where lessons are kept instead.
        identity: plain data that pins the target's content, for the names of files there.
        kept_bytes: of memory for what is kept.
    """

    def __init__(
        self,
        target: PackedDecoder,
        examples: Sequence[Example],
        layers: Sequence[int],
        known: Tensor,
        top_k: int,
        *,
        folder: Path | None = None,
        identity: object = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._target, self._examples, self._layers = target, examples, layers
        self._known, self._top_k = known.to(target.device), min(top_k, len(known))
        self._kept: dict[int, Lesson] = {}
        self._room, self._folder = kept_bytes, folder
        of = [_FORMAT, identity, list(layers), known.tolist(), self._top_k]
        self._name = hashlib.sha256(json.dumps(of).encode())
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def of(self, indices: Sequence[int]) -> Lesson:
        """The lesson of some examples, in this order."""
        there = {i: lesson for i in indices if (lesson := self._recall(i)) is not None}
        missing = [i for i in indices if i not in there]
        for index, lesson in zip(missing, self._read(missing), strict=True):
            there[index] = lesson
            self._keep(index, lesson)
        found = [there[i] for i in indices]
        return Lesson(
            torch.cat([each.states for each in found]),
            torch.cat([each.ids for each in found]).long(),
            torch.cat([each.probs for each in found]),
        )

    def _path(self, folder: Path, index: int) -> Path:
        name = self._name.copy()
        name.update(self._examples[index].digest.encode())
        return folder / f"lesson-{name.hexdigest()[:32]}.safetensors"

    def _recall(self, index: int) -> Lesson | None:
        """The lesson of an example, if it is kept."""
        if self._folder is None:
            return self._kept.get(index)
        path = self._path(self._folder, index)
        if not path.exists():
            return None
        return Lesson(**load_file(path, device=str(self._target.device)))

    def _keep(self, index: int, lesson: Lesson) -> None:
        if self._folder is not None:
            with atomic_file(self._path(self._folder, index)) as fresh:
                save_file(
                    {"states": lesson.states, "ids": lesson.ids, "probs": lesson.probs}, fresh
                )
        elif lesson.bytes <= self._room:
            self._kept[index] = lesson
            self._room -= lesson.bytes

    def _read(self, indices: Sequence[int]) -> list[Lesson]:
        """The target's pass over some examples; the lesson of each."""
        if not indices:
            return []
        chosen = [self._examples[i] for i in indices]
        hidden, inputs = read_states(self._target, chosen, self._layers)
        keep = torch.tensor(output_positions(lengths_of(chosen)), device=hidden.device)
        tops = []
        for rows in torch.split(hidden[keep], LOGIT_ROWS):
            logits = self._target.logits(rows)[:, self._known].float()
            tops.append(torch.topk(torch.softmax(logits, -1), self._top_k))
        states = torch.cat([inputs[layer] for layer in self._layers], -1)
        ids, probs = (torch.cat([top[i] for top in tops]) for i in (1, 0))
        whole = torch.split(states, [len(e.input_ids) for e in chosen])
        counts = [len(e.output_ids) for e in chosen]
        parts = zip(whole, torch.split(ids.int(), counts), torch.split(probs, counts), strict=True)
        # Copies: what inference mode made lets no gradient pass, and a part keeps the whole.
        return [Lesson(*(each.clone() for each in part)) for part in parts]
