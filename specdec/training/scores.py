"""What the target thinks of its outputs, by teacher forcing: top-k probabilities, kept in shards.

The target reads each example once. Its k likeliest tokens at every output position go to files that
are named after what they were made from, so that an interrupted pass, or another run over some of
the same examples, computes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.atomic import atomic_file
from specdec.model.decoder import PackedDecoder
from specdec.model.features import Features
from specdec.training.examples import Example, packs

PACK_TOKENS = 2048
"""Tokens of one target forward, about. More take more memory; fewer leave the device idle."""

LOGIT_ROWS = 256
"""Positions whose logits are in memory at once: 150 MB with 150,000 tokens in a vocabulary.

Raised, a pass takes more memory and hardly less time.
"""

_SHARD_EXAMPLES = 64
"""Examples of a shard, in the mean.

Raised, an interrupted pass loses more, and an example that is added makes more to compute again.
"""

_FORMAT = 1
"""Part of every shard's name: raised when their content changes, so that old ones go unused."""


def output_positions(lengths: Sequence[tuple[int, int]], stride: int | None = None) -> list[int]:
    """Where, in rows laid out one after another, output tokens are predicted.

    Args:
        lengths: prompt and output tokens of each row.
        stride: positions from the start of a row to that of the next; None: rows are end to end.

    Example:
        A prompt of 3 and an output of 2 tokens take 4 positions; those at index 2 and 3 count:
        `output_positions([(3, 2), (1, 1)])` is `[2, 3, 4]`.
    """
    positions: list[int] = []
    start = 0
    for prompt, output in lengths:
        positions += range(start + prompt - 1, start + prompt + output - 1)
        start += stride if stride is not None else prompt + output - 1
    return positions


def lengths_of(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """Prompt and output tokens of each example."""
    return [(len(e.prompt_ids), len(e.output_ids)) for e in examples]


def target_states(
    target: PackedDecoder, examples: Sequence[Example]
) -> Iterator[tuple[list[int], Tensor]]:
    """The target's last hidden states at output positions.

    Yields:
        Indices of a few examples and their states [n, hidden], in the order of the indices.
    """
    for pack in packs(examples, PACK_TOKENS):
        chosen = [examples[i] for i in pack]
        hidden, _ = read_states(target, chosen)
        keep = torch.tensor(output_positions(lengths_of(chosen)), device=target.device)
        yield pack, hidden[keep]


@torch.inference_mode()
def read_states(
    target: PackedDecoder, examples: Sequence[Example], layers: Sequence[int] = ()
) -> tuple[Tensor, dict[int, Tensor]]:
    """The target's last hidden states of the examples' tokens, and those that go into some layers.

    Args:
        layers: rising.

    Returns:
        [N, hidden] each, the examples end to end; the second by layer.
    """
    rows = [(slot, len(e.input_ids)) for slot, e in enumerate(examples)]
    tokens = torch.tensor([t for e in examples for t in e.input_ids], device=target.device)
    cache = target.new_cache(0, 0)
    noted = _Noted()
    if layers:
        cache.keep_features(Features(tuple(layers), 1, noted))
    cache.grow(len(rows), max(count for _, count in rows))
    hidden = target.forward(cache, rows, tokens)
    parts = noted.states.chunk(len(layers), -1) if layers else ()
    return hidden, dict(zip(layers, parts, strict=True))


class _Noted:
    """Makes features of nothing; remembers what they would have been made of."""

    states: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        self.states = states
        return states[:, :1]


@dataclass(frozen=True, slots=True)
class _Shard:
    """Consecutive examples [begin, end) and the file that has, or will have, their scores."""

    begin: int
    end: int
    path: Path


class Scores:
    """The target's likeliest tokens for a list of examples, read from shards when asked for."""

    def __init__(self, shards: Sequence[_Shard], examples: Sequence[Example]) -> None:
        self._place: list[tuple[Any, int, int]] = []
        for shard in shards:
            file: Any = safe_open(shard.path, framework="pt")
            slices = (file.get_slice("ids"), file.get_slice("probs"))
            start = 0
            for example in examples[shard.begin : shard.end]:
                end = start + len(example.output_ids)
                self._place.append((slices, start, end))
                start = end

    def of(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Token ids (int64) and probabilities (float32), [n, k] each, likeliest first.

        Args:
            indices: of examples; n counts their output positions, in this order.
        """
        ids, probs = [], []
        for slices, start, end in (self._place[i] for i in indices):
            ids.append(slices[0][start:end])
            probs.append(slices[1][start:end])
        return torch.cat(ids).long(), torch.cat(probs)


def score(
    target: PackedDecoder,
    examples: Sequence[Example],
    folder: Path,
    *,
    vocab_size: int,
    top_k: int,
    identity: object,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """The target's top-k probabilities, at temperature 1, at every output position.

    Args:
        target: scores in its own dtype; probabilities are float32.
        folder: where shards are, and where missing ones are written.
        vocab_size: tokens that count; logits of padding rows are cut off.
        identity: plain data that pins the target's content.
        progress: called with the output tokens done and in all; those found done are not counted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(examples, folder, [_FORMAT, identity, vocab_size, top_k])
    missing = [shard for shard in shards if not shard.path.exists()]
    total = sum(len(e.output_ids) for s in missing for e in examples[s.begin : s.end])
    done = 0
    for shard in missing:
        tensors = _score(target, examples[shard.begin : shard.end], vocab_size, top_k)
        # Runs that share the folder may be at the same shard, with the same content.
        with atomic_file(shard.path) as fresh:
            save_file(tensors, fresh)
        done += len(tensors["ids"])
        progress(done, total)
    return Scores(shards, examples)


def _shards(examples: Sequence[Example], folder: Path, identity: object) -> list[_Shard]:
    """Cut examples into shards of about _SHARD_EXAMPLES.

    The content says where: examples that are added or left out change the shards around them only.
    """
    shards, begin = [], 0
    name = hashlib.sha256(json.dumps(identity).encode())
    current = name.copy()
    for index, example in enumerate(examples):
        digest = example.digest
        current.update(digest.encode())
        if int(digest[:8], 16) % _SHARD_EXAMPLES == 0 or index + 1 == len(examples):
            path = folder / f"scores-{current.hexdigest()[:32]}.safetensors"
            shards.append(_Shard(begin, index + 1, path))
            begin, current = index + 1, name.copy()
    return shards


@torch.inference_mode()
def _score(
    target: PackedDecoder, examples: Sequence[Example], vocab_size: int, top_k: int
) -> dict[str, Tensor]:
    """The content of a shard: `ids` int32 and `probs` float32, [n, k], in the examples' order."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    k = min(top_k, vocab_size)
    for pack, states in target_states(target, examples):
        tops = []
        for chunk in torch.split(states, LOGIT_ROWS):
            probs = torch.softmax(target.logits(chunk)[:, :vocab_size].float(), -1)
            tops.append(torch.topk(probs, k))
        probs = torch.cat([top.values for top in tops]).cpu()
        ids = torch.cat([top.indices for top in tops]).int().cpu()
        counts = [len(examples[i].output_ids) for i in pack]
        rows = zip(torch.split(ids, counts), torch.split(probs, counts), strict=True)
        found.update(zip(pack, rows, strict=True))
    ordered = [found[i] for i in range(len(examples))]
    return {
        "ids": torch.cat([ids for ids, _ in ordered]),
        "probs": torch.cat([probs for _, probs in ordered]),
    }
