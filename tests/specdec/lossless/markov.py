"""A speculative decoder without models: tables of logits, small enough to enumerate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.lossless.proposal import Nodes, Proposal
from specdec.lossless.sampling import Draw, SamplingBatch, uniform
from specdec.lossless.verification import MODES, Mode
from specdec.request import SamplingParams
from tests.specdec.goodness import reference_distribution

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Markov:
    """Language models small enough to enumerate: logits depend on the last token alone."""

    target: Tensor
    draft: Tensor

    @classmethod
    def random(cls, vocab: int, seed: int, disagreement: float = 1.5) -> Markov:
        generator = torch.Generator().manual_seed(seed)
        target = 1.5 * torch.randn(vocab, vocab, generator=generator)
        noise = disagreement * torch.randn(vocab, vocab, generator=generator)
        return cls(target, target + noise)

    @property
    def vocab(self) -> int:
        return len(self.target)

    def first_two(self, params: SamplingParams) -> Tensor:
        """float64 [V, V]: exact joint distribution of the two tokens after token 0."""
        p = reference_distribution(self.target, params)
        return p[0][:, None] * p


Trim = Callable[[Tensor, Tensor], Tensor]
"""(candidates [n, K], draft probabilities of each [n, K]) -> submitted lengths [n]."""


@dataclass
class Outcome:
    tokens: Tensor
    """[n, 2], the first two output tokens."""
    verified: int
    accepted: int


def decode_two(
    models: Markov,
    params: SamplingParams,
    mode: Mode,
    k: int,
    rows: int = 60_000,
    first_seed: int = 0,
    trim: Trim | None = None,
    certain: Tensor | None = None,
    known: int | None = None,
) -> Outcome:
    """The first two output tokens of `rows` independent requests with seeds of their own.

    Args:
        certain: [V], the candidate that follows each token; nothing is drawn then.
        known: rows have 0, 1, .. so many certain candidates in turn, and draw the others.
    """
    seed = torch.arange(first_seed, first_seed + rows)
    output = torch.zeros(rows, 2 + k + 1, dtype=torch.int64)
    generated = torch.zeros(rows, dtype=torch.int64)
    verified = accepted_total = 0
    batch = SamplingBatch.of([params], CPU)
    number = 0
    while len(active := (generated < 2).nonzero().flatten()):
        n = len(active)
        shared = batch.rows(torch.zeros(n, dtype=torch.int64))
        shared.seed.copy_(seed[active])
        if mode is MODES["rejection"]:
            shared = shared.in_round(torch.full((n,), number))
        number += 1
        start = generated[active]
        last = torch.where(start > 0, output[active, (start - 1).clamp(min=0)], 0)
        index = torch.arange(n)
        leads = torch.full((n,), 0 if certain is None else k)
        if known is not None:
            leads = active % (known + 1)
        contexts, scores = torch.zeros(n, k + 1, dtype=torch.int64), torch.ones(n, k)
        contexts[:, 0] = last
        for depth in range(k):
            if certain is not None:
                contexts[:, depth + 1] = certain[contexts[:, depth]]
        if certain is None:
            proposal = Proposal(n, k, CPU)
        else:
            rows_of = zip(contexts.tolist(), leads.tolist(), strict=True)
            proposal = Proposal.certain([row[1 : lead + 1] for row, lead in rows_of], CPU, k)
        for depth in range(k):
            going = index[leads + depth < k]
            if not len(going):
                break
            at = leads[going] + depth
            logits = models.draft[contexts[going, at]]
            tokens, q = mode.propose(logits, shared.rows(going), start[going] + at)
            proposal.add(going.tolist(), going, tokens, q)
            scores[going, at] = torch.softmax(logits, -1).gather(1, tokens[:, None]).squeeze(1)
            contexts[going, at + 1] = tokens
        lengths = torch.full((n,), k)
        if trim is not None:
            lengths = trim(proposal.candidates, scores)
        packed_row = index.repeat_interleave(lengths + 1)
        first = (lengths + 1).cumsum(0) - lengths - 1
        offset = torch.arange(len(packed_row)) - first[packed_row]
        context = contexts[packed_row, offset]
        accepted, bonus = mode.verify(
            models.target[context],
            shared.rows(packed_row),
            start[packed_row] + offset,
            first,
            lengths,
            proposal,
        )
        assert ((accepted >= 0) & (accepted <= lengths)).all()
        steps = torch.arange(k)
        places = (start[:, None] + steps).clamp(max=output.shape[1] - 1)
        rows_at = active[:, None].expand(-1, k)
        stands = steps < accepted[:, None]
        output[rows_at[stands], places[stands]] = proposal.candidates[stands]
        output[active, start + accepted] = bonus
        generated[active] = start + accepted + 1
        verified += int(lengths.sum())
        accepted_total += int(accepted.sum())
    return Outcome(output[:, :2], verified, accepted_total)


class Grown(Proposal):
    """Trees that are made as tensors, for many rows at once."""

    def __init__(self, nodes: Nodes, q: list[Tensor], q_row: Tensor) -> None:
        super().__init__(0, 0, CPU)
        self.candidates, self._made, self._drawn = nodes.tokens[:, 1:], nodes, (q, q_row)

    def nodes(self) -> Nodes:
        return self._made

    def distributions(self) -> tuple[Tensor, Tensor] | None:
        q, q_row = self._drawn
        return (torch.cat(q), q_row) if q else None


@dataclass(frozen=True)
class Prune:
    """Rows submit all nodes where a condition on their candidates [n, nodes] holds, else some."""

    condition: Callable[[Tensor], Tensor]
    otherwise: tuple[int, ...]


def children_of(parents: Sequence[int], kept: Sequence[int], width: int) -> Tensor:
    """int64 [nodes + 1, width], as in `Nodes`: the places of the kept children of each place."""
    own = [[n + 1 for n in kept if parents[n] == at] for at in range(-1, len(parents))]
    return torch.tensor([[*each, *[0] * (width - len(each))] for each in own])


def decode_two_by_trees(
    models: Markov,
    params: SamplingParams,
    mode: Mode,
    parents: Sequence[int],
    rows: int = 60_000,
    prune: Prune | None = None,
) -> Outcome:
    """As `decode_two`, by a tree of one shape.

    Args:
        parents: of each node the one that it follows, -1 for the root; nodes level by level.
    """
    n_nodes = len(parents)
    depths, paths = [0], list[list[int]]([[]])  # by place
    for node, parent in enumerate(parents):
        depths.append(depths[parent + 1] + 1)
        paths.append([*paths[parent + 1], node])
    width, deepest = max(map(parents.count, parents)), max(depths)
    path_of = torch.tensor([[*path, *[0] * (deepest - len(path))] for path in paths])
    depth_of, steps = torch.tensor(depths), torch.arange(deepest)
    whole = children_of(parents, range(n_nodes), width)

    output = torch.zeros(rows, 2 + deepest + 1, dtype=torch.int64)
    generated = torch.zeros(rows, dtype=torch.int64)
    verified = accepted_total = number = 0
    batch = SamplingBatch.of([params], CPU)
    while len(active := (generated < 2).nonzero().flatten()):
        n = len(active)
        shared = batch.rows(torch.zeros(n, dtype=torch.int64))
        shared.seed.copy_(active)
        if mode is MODES["rejection"]:
            shared = shared.in_round(torch.full((n,), number))
        number += 1
        start = generated[active]
        contexts = [torch.where(start > 0, output[active, (start - 1).clamp(min=0)], 0)]
        drawn: list[Tensor] = []
        q_row = torch.zeros(n, n_nodes + 1, dtype=torch.int64)
        expanded = dict[int, int]()  # by depth: nodes so far
        for parent in range(-1, n_nodes):
            children, depth = parents.count(parent), depths[parent + 1]
            if not children:
                continue
            # Numbers of their own for each node of a depth.
            branch = width * expanded.get(depth, 0) + torch.arange(width)
            expanded[depth] = expanded.get(depth, 0) + 1
            at = start + depth
            u = uniform(shared.seed[:, None], at[:, None], Draw.CANDIDATE, branch)
            drawing = replace(shared, drawn=u[:, 0] if width == 1 else u)
            tokens, q = mode.propose(models.draft[contexts[parent + 1]], drawing, at, width)
            contexts += tokens.view(n, width)[:, :children].unbind(1)
            if q is not None:
                q_row[:, parent + 1] = n * len(drawn) + torch.arange(n)
                drawn.append(q)
        tokens = torch.stack(contexts, 1)
        children, kept = whole.expand(n, -1, -1), torch.full((n,), n_nodes)
        if prune is not None:
            stay = prune.condition(tokens[:, 1:])
            part = children_of(parents, prune.otherwise, width)
            children = torch.where(stay[:, None, None], children, part)
            kept = torch.where(stay, kept, len(prune.otherwise))
        packed_row = torch.arange(n).repeat_interleave(n_nodes + 1)
        first = torch.arange(n) * (n_nodes + 1)
        place, bonus = mode.verify(
            models.target[tokens.flatten()],
            shared.rows(packed_row),
            (start[:, None] + depth_of).flatten(),
            first,
            kept,
            Grown(Nodes(tokens, children, deepest), drawn, q_row),
        )
        accepted = depth_of[place]
        at = (start[:, None] + steps).clamp(max=output.shape[1] - 1)
        rows_at = active[:, None].expand(-1, deepest)
        stands = steps < accepted[:, None]
        output[rows_at[stands], at[stands]] = tokens[:, 1:].gather(1, path_of[place])[stands]
        output[active, start + accepted] = bonus
        generated[active] = start + accepted + 1
        verified += int(kept.sum())
        accepted_total += int(accepted.sum())
    return Outcome(output[:, :2], verified, accepted_total)
