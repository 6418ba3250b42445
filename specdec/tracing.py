"""Recording what a draft would have proposed along texts of its target, to replay any policy on.

The text x of a trace is the target's own. At each position t, draft and target see x_<t, and a
candidate y_t is drawn jointly with the given x_t as rejection sampling would have: there, y ~ q,
the committed token is y with probability min(1, p(y) / q(y)) and otherwise ~ (p - q)+, so that

    P(y = x = v) = q(v) min(1, p(v) / q(v)) = min(p(v), q(v)),

and what is left of q and p is drawn independently. Read the other way round: given x ~ p, y = x
with probability min(1, q(x) / p(x)), and otherwise y ~ (q - p)+. The joint law is the same, so what
is replayed on a fixed text has the distribution of a real run (specdec/simulate.py). A matching
mode draws y_t as it does in the engine.

A policy does not know that y_t is wrong and drafts on. For these steps the draft is rolled out from
x_<t y_t by itself, and what it signals is recorded too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from specdec.acceptance import AcceptanceHead, Signal, read_signals
from specdec.cache import SlotCache
from specdec.packed import PackedDecoder
from specdec.request import SamplingParams
from specdec.sampling import Draw, SamplingBatch, coupled_choice, probabilities, sample, uniform
from specdec.simulate import Trace
from specdec.verification import MODES

ROWS = 64
"""Positions whose logits are computed at once, and branches rolled out together."""


class SpeculativePair(Protocol):
    """What recording needs of a `ModelPair`."""

    target: PackedDecoder
    draft: PackedDecoder | None
    vocab_size: int


@torch.inference_mode()
def record(
    pair: SpeculativePair,
    texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    sampling: Sequence[SamplingParams],
    *,
    verification: Literal["rejection", "coupled"] = "rejection",
    head: AcceptanceHead | None = None,
    depth: int = 20,
    progress: Callable[[int], None] | None = None,
) -> list[Trace]:
    """Traces of texts that the target generated.

    Args:
        texts: prompt ids and output ids of each, at least one of both.
        sampling: what each was generated with.
        head: its signals are recorded, too.
        depth: most candidates of a policy that the traces are for.
        progress: called with 1 after each text.

    Raises:
        ValueError: the pair has no draft.
    """
    if pair.draft is None:
        raise ValueError("a trace needs a draft")
    traces = []
    for (prompt, output), params in zip(texts, sampling, strict=True):
        traces.append(_record(pair, pair.draft, prompt, output, params, verification, head, depth))
        if progress:
            progress(1)
    return traces


def _record(
    pair: SpeculativePair,
    draft: PackedDecoder,
    prompt: tuple[int, ...],
    output: tuple[int, ...],
    params: SamplingParams,
    verification: Literal["rejection", "coupled"],
    head: AcceptanceHead | None,
    depth: int,
) -> Trace:
    device, n = pair.target.device, len(output)
    known = torch.tensor([*prompt, *output[:-1]], device=device)
    x = torch.tensor(output, device=device)
    target_hidden = _outputs(pair.target, pair.target.new_cache(1, len(known)), known, n)
    cache = draft.new_cache(1 + ROWS, len(known) + depth + 1)
    draft_hidden = _outputs(draft, cache, known, n)

    candidates, signals, chances = [], [], []
    for begin in range(0, n, ROWS):
        part = slice(begin, min(begin + ROWS, n))
        at = torch.arange(part.start, part.stop, device=device)
        batch = SamplingBatch.of([params] * len(at), device)
        q_logits = draft.logits(draft_hidden[part])[:, : pair.vocab_size]
        p_logits = pair.target.logits(target_hidden[part])[:, : pair.vocab_size]
        p, q = probabilities(p_logits, batch), probabilities(q_logits, batch)
        if verification == "coupled" and not batch.all_greedy:
            y = coupled_choice(q, batch.seed, at)
        else:
            y = _reverse_coupling(p, q, x[part], batch.seed, at)
        candidates.append(y)
        signals.append(read_signals(q_logits, y, draft_hidden[part], frozenset(Signal), head))
        index = y[:, None]
        chances.append(torch.cat([p.gather(1, index), q.gather(1, index)], 1))
    y = torch.cat(candidates)
    accepted = y == x

    branches = torch.zeros(n, depth, len(Signal))
    wrong = torch.nonzero(~accepted)[:, 0].tolist()
    for begin in range(0, len(wrong), ROWS):
        some = wrong[begin : begin + ROWS]
        branches[some] = _roll_out(
            pair, draft, cache, len(prompt), some, y[some], params, verification, head, depth
        )
    return Trace(
        context=len(prompt),
        accepted=accepted.cpu().numpy(),
        signals=torch.cat(signals).cpu().numpy().astype(np.float32),
        branches=branches.numpy().astype(np.float32),
        chances=torch.cat(chances).cpu().numpy().astype(np.float32),
    )


def _outputs(decoder: PackedDecoder, cache: SlotCache, known: Tensor, n: int) -> Tensor:
    """Hidden states [n, width] behind the last n tokens' successors; slot 0 of the cache is fed."""
    return decoder.forward(cache, [(0, len(known))], known)[-n:]


def _reverse_coupling(p: Tensor, q: Tensor, x: Tensor, seed: Tensor, at: Tensor) -> Tensor:
    """Candidates int64 [n] drawn jointly with given tokens x ~ p; see the module's head."""
    chosen = x[:, None]
    keep = uniform(seed, at, Draw.ACCEPT) * p.gather(1, chosen)[:, 0] < q.gather(1, chosen)[:, 0]
    residual = (q - p).clamp_(min=0)
    residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, q)
    return torch.where(keep, x, sample(residual, uniform(seed, at, Draw.CANDIDATE)))


def _roll_out(
    pair: SpeculativePair,
    draft: PackedDecoder,
    cache: SlotCache,
    prompt: int,
    positions: Sequence[int],
    tokens: Tensor,
    params: SamplingParams,
    verification: Literal["rejection", "coupled"],
    head: AcceptanceHead | None,
    depth: int,
) -> Tensor:
    """Signals [n, depth, len(Signal)] of what the draft proposes after a wrong candidate.

    Args:
        cache: slot 0 holds prompt and output; the other slots are overwritten.
        positions: output positions of the n wrong candidates `tokens`.
    """
    slots = list(range(1, 1 + len(positions)))
    for slot, position in zip(slots, positions, strict=True):
        length = prompt + position
        for tensor in (*cache.keys, *cache.values):
            tensor[slot, :, :length] = tensor[0, :, :length]
        cache.lengths[slot] = length
    batch = SamplingBatch.of([params] * len(slots), draft.device)
    mode = MODES["coupled" if batch.all_greedy else verification]
    at = torch.tensor(positions, device=draft.device)
    steps = []
    for _ in range(depth):
        at = at + 1
        hidden = draft.forward(cache, [(slot, 1) for slot in slots], tokens)
        logits = draft.logits(hidden)[:, : pair.vocab_size]
        tokens, _ = mode.propose(logits, batch, at)
        steps.append(read_signals(logits, tokens, hidden, frozenset(Signal), head))
    return torch.stack(steps, 1).cpu()
