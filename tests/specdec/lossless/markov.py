"""A speculative decoder without models: tables of logits, small enough to enumerate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from specdec.lossless.proposal import Proposal, TreeProposal
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
    rows: int = 100_000,
    first_seed: int = 0,
    trim: Trim | None = None,
    certain: Tensor | None = None,
) -> Outcome:
    """The first two output tokens of `rows` independent requests with seeds of their own.

    Args:
        certain: [V], the candidate that follows each token; nothing is drawn then.
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
        proposal = Proposal(n, k, CPU)
        index = torch.arange(n)
        contexts, scores = [last], []
        for depth in range(k):
            if certain is not None:
                contexts.append(certain[contexts[-1]])
                scores.append(torch.ones(n, 1))
                continue
            logits = models.draft[contexts[-1]]
            tokens, q = mode.propose(logits, shared, start + depth)
            proposal.add(range(n), index, tokens, q)
            scores.append(torch.softmax(logits, -1).gather(1, tokens[:, None]))
            contexts.append(tokens)
        if certain is not None:
            proposal = Proposal.certain(torch.stack(contexts[1:], 1).tolist(), CPU)
        lengths = torch.full((n,), k)
        if trim is not None:
            lengths = trim(proposal.candidates, torch.cat(scores, 1))
        packed_row = index.repeat_interleave(lengths + 1)
        first = (lengths + 1).cumsum(0) - lengths - 1
        offset = torch.arange(len(packed_row)) - first[packed_row]
        context = torch.stack(contexts, 1)[packed_row, offset]
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


Prune = Callable[[Tensor], Sequence[Sequence[int]]]
"""Candidates [n, nodes] -> the nodes that each row submits."""


def decode_two_by_trees(
    models: Markov,
    params: SamplingParams,
    mode: Mode,
    parents: Sequence[int],
    rows: int = 30_000,
    prune: Prune | None = None,
) -> Outcome:
    """As `decode_two`, by a tree of one shape.

    Args:
        parents: of each node the one that it follows, -1 for the root; nodes level by level.
    """
    nodes = range(len(parents))
    depths, paths = [0], list[list[int]]([[]])  # by place
    for node in nodes:
        depths.append(depths[parents[node] + 1] + 1)
        paths.append([*paths[parents[node] + 1], node])
    width = max(parents.count(parent) for parent in (-1, *nodes))
    deepest = max(depths)
    path_of = torch.tensor([[*path, *[0] * (deepest - len(path))] for path in paths])
    depth_of, steps = torch.tensor(depths), torch.arange(deepest)

    seed = torch.arange(rows)
    output = torch.zeros(rows, 2 + deepest + 1, dtype=torch.int64)
    generated = torch.zeros(rows, dtype=torch.int64)
    verified = accepted_total = number = 0
    batch = SamplingBatch.of([params], CPU)
    while len(active := (generated < 2).nonzero().flatten()):
        n = len(active)
        shared = batch.rows(torch.zeros(n, dtype=torch.int64))
        shared.seed.copy_(seed[active])
        if mode is MODES["rejection"]:
            shared = shared.in_round(torch.full((n,), number))
        number += 1
        start = generated[active]
        contexts = [torch.where(start > 0, output[active, (start - 1).clamp(min=0)], 0)]
        proposal = TreeProposal(n, len(parents), CPU)
        for parent in (-1, *nodes):
            children = parents.count(parent)
            if not children:
                continue
            at = start + depths[parent + 1]
            # Numbers of their own for each node of a depth.
            others = sum(depths[node + 1] == depths[parent + 1] for node in range(max(parent, 0)))
            branch = width * others + torch.arange(width)
            u = uniform(shared.seed[:, None], at[:, None], Draw.CANDIDATE, branch)
            drawing = replace(shared, drawn=u[:, 0] if width == 1 else u)
            tokens, q = mode.propose(models.draft[contexts[parent + 1]], drawing, at, width)
            tokens = tokens.view(n, width)
            proposal.grow(range(n), [parent] * n, [children] * n, tokens, q)
            contexts += tokens[:, :children].unbind(1)
        numbers = [nodes] * n if prune is None else prune(proposal.candidates)
        submitted = proposal.of(numbers)
        lengths = torch.tensor(submitted.lengths)
        packed_row = torch.arange(n).repeat_interleave(lengths + 1)
        first = (lengths + 1).cumsum(0) - lengths - 1
        places = torch.tensor([place for each in numbers for place in (0, *(i + 1 for i in each))])
        context = torch.stack(contexts, 1)[packed_row, places]
        place, bonus = mode.verify(
            models.target[context],
            shared.rows(packed_row),
            start[packed_row] + depth_of[places],
            first,
            lengths,
            submitted,
        )
        place = places[first + place]  # among all nodes
        accepted = depth_of[place]
        at = (start[:, None] + steps).clamp(max=output.shape[1] - 1)
        rows_at = active[:, None].expand(-1, deepest)
        stands = steps < accepted[:, None]
        tokens = proposal.candidates.gather(1, path_of[place])
        output[rows_at[stands], at[stands]] = tokens[stands]
        output[active, start + accepted] = bonus
        generated[active] = start + accepted + 1
        verified += int(lengths.sum())
        accepted_total += int(accepted.sum())
    return Outcome(output[:, :2], verified, accepted_total)
