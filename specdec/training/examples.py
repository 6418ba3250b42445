"""What is learned from: prompts with the target's outputs, split, packed and kept as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from specdec.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and what the target made of it.

    Attributes:
        id: the row's name; not unique where several jobs completed the same rows.
        prompt_ids, output_ids: token ids, at least one of each.
        group: results are reported by it, such as the row's input file.
        sampling: how the output was drawn; None: not known. A draft learns the same from it either
            way, so files of examples do not say it.
    """

    id: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    group: str = ""
    sampling: SamplingParams | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids or not self.output_ids:
            raise ValueError(f"example {self.id}: prompt and output need at least one token each")

    @property
    def input_ids(self) -> tuple[int, ...]:
        """What a model reads to predict every output token: all tokens but the last."""
        return (self.prompt_ids + self.output_ids)[:-1]

    @property
    def digest(self) -> str:
        """Hex digest of the tokens, whatever the row's name."""
        return _digest(self.prompt_ids, self.output_ids)


def _digest(*parts: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps([list(part) for part in parts]).encode()).hexdigest()


def split(examples: Iterable[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Examples to learn from and examples held out, about `share` of all.

    The prompt decides, so one example's side does not depend on what else there is, and a prompt
    that was completed several times is never on both sides.
    """
    train: list[Example] = []
    held_out: list[Example] = []
    for example in examples:
        draw = int(_digest(example.prompt_ids)[:8], 16) / 2**32
        (held_out if draw < share else train).append(example)
    return train, held_out


def cut(examples: Iterable[Example], positions: int) -> list[Example]:
    """Examples with outputs cut so that a model of `positions` positions can read them.

    Those whose prompt alone is too long are left out.
    """
    return [
        replace(e, output_ids=e.output_ids[: positions + 1 - len(e.prompt_ids)])
        for e in examples
        if len(e.prompt_ids) <= positions
    ]


def packs(
    examples: Sequence[Example], budget: int, generator: torch.Generator | None = None
) -> list[list[int]]:
    """Indices of examples of similar length that together, padded, have at most `budget` tokens.

    An example longer than that is alone. There are as many packs whatever the generator.

    Args:
        generator: shuffles the packs, and examples of equal length among them; None keeps the
            longest first.
    """
    order = list(range(len(examples)))
    if generator is not None:
        order = torch.randperm(len(examples), generator=generator).tolist()
    lengths = [len(e.prompt_ids) + len(e.output_ids) - 1 for e in examples]
    order.sort(key=lambda i: -lengths[i])
    result: list[list[int]] = []
    for index in order:
        if not result or lengths[result[-1][0]] * (len(result[-1]) + 1) > budget:
            result.append([])
        result[-1].append(index)
    if generator is not None:
        shuffled = torch.randperm(len(result), generator=generator).tolist()
        result = [result[i] for i in shuffled]
    return result


def to_lines(examples: Iterable[Example]) -> str:
    """Examples as JSON lines."""
    names = ("id", "prompt_ids", "output_ids", "group")
    return "".join(json.dumps({n: getattr(e, n) for n in names}) + "\n" for e in examples)


def from_lines(lines: str) -> list[Example]:
    """The examples that `to_lines` wrote."""
    return [
        Example(each["id"], tuple(each["prompt_ids"]), tuple(each["output_ids"]), each["group"])
        for each in map(json.loads, lines.splitlines())
    ]
