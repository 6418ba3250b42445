"""The two lossless verification modes, as pure functions of tensors.

Rows are ragged. Row b submitted `lengths[b]` candidates, so the target scored `lengths[b] + 1`
positions for it: they lie one after another in a packed tensor, and `first[b]` is where row b's
begin.

Where the target's logits have no softmax, no candidate stands and the bonus token is NO_TOKEN: that
row has failed. A draft without a softmax fails nobody: its candidate is token 0, and is judged as
if it had not been submitted.

Candidates that branch are judged in specdec/lossless/trees.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.lossless.proposal import Nodes, Proposal
from specdec.lossless.sampling import (
    Draw,
    SamplingBatch,
    coupled_choice,
    coupled_scores,
    greedy_choice,
    probabilities,
    sample,
    sample_distinct,
    uniform,
)
from specdec.lossless.trees import match_tree, reject_tree


def accepted_prefix(ok: Tensor, lengths: Tensor) -> Tensor:
    """How many leading candidates stand.

    Args:
        ok: bool [B, K], the verdict on each candidate.
        lengths: int64 [B], how many of the K were submitted.

    Returns:
        int64 [B] in 0..lengths.
    """
    submitted = torch.arange(ok.shape[1], device=ok.device) < lengths[:, None]
    return (ok & submitted).long().cumprod(-1).sum(-1)


def candidate_positions(first: Tensor, lengths: Tensor, most: int) -> Tensor:
    """int64 [B, most]: the packed position that judges candidate (b, k); row b's last beyond it."""
    steps = torch.arange(most, device=first.device)
    return first[:, None] + torch.minimum(steps, lengths[:, None])


def match(
    choices: Tensor, first: Tensor, candidates: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Coupled matching, and greedy verification: a candidate stands iff the target chooses it too.

    The output is the sequence of the target's own choices, so it depends on the draft in nothing
    but how many of them one round yields.

    Args:
        choices: int64 [M], the token the target chooses at each packed position, or NO_TOKEN.
        first: int64 [B]; candidates: int64 [B, K]; lengths: int64 [B].

    Returns:
        accepted int64 [B] and bonus int64 [B], the target's choice after the accepted prefix.
    """
    at = candidate_positions(first, lengths, candidates.shape[1])
    accepted = accepted_prefix(choices[at] == candidates, lengths)
    return accepted, choices[first + accepted]


def reject(
    p: Tensor,
    first: Tensor,
    q: Tensor,
    q_row: Tensor,
    candidates: Tensor,
    lengths: Tensor,
    u: Tensor,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rejection sampling: accept y with probability min(1, p(y) / q(y)).

    Leviathan et al. (arXiv 2211.17192), algorithm 1; Chen et al. (arXiv 2302.01318), theorem 1. A
    greedy row is its one-hot case: accepted iff y is the target's argmax. So is a candidate that
    nobody drew, which is its q's only mass (`reject_certain`).

    Args:
        p: float32 [M, V], the target's distributions at the packed positions.
        first: int64 [B].
        q: float32 [D, V], the draft's distributions that the candidates were drawn from.
        q_row: int64 [B, K], which row of q candidate (b, k) was drawn from; anything valid beyond
            lengths.
        candidates: int64 [B, K]; lengths: int64 [B].
        u: float64 [B, K] uniform numbers in [0, 1), independent of the candidates; of those that
            nobody drew, independent of all that they depend on.
        known: int64 [B], how many candidates of each row nobody drew: its first. None: none at all.

    Returns:
        accepted int64 [B], and residual float32 [B, V], what the bonus token is drawn from (not
        normalised): (p - q)+ after a rejection, p after a full acceptance. A candidate whose q is
        NaN falls, and its residual is p.
    """
    at = candidate_positions(first, lengths, candidates.shape[1])
    likely = q[q_row, candidates]
    if known is not None:
        certain = torch.arange(candidates.shape[1], device=at.device) < known[:, None]
        likely = torch.where(certain, 1.0, likely)
    accepted = accepted_prefix(u * likely < p[at, candidates], lengths)

    target = p[first + accepted]
    fallen = accepted.clamp(max=candidates.shape[1] - 1)  # the rejected candidate, if there is one
    draft = q[q_row.gather(1, fallen[:, None]).squeeze(1)]
    if known is not None:
        one_hot = torch.zeros_like(draft).scatter_(1, candidates.gather(1, fallen[:, None]), 1.0)
        draft = torch.where((fallen < known)[:, None], one_hot, draft)
    rejected = ((accepted < lengths) & ~draft[:, 0].isnan())[:, None]
    residual = torch.where(rejected, (target - draft).clamp_(min=0), target)
    # p == q up to rounding can be rejected by a hair, with nothing left: p is the right answer.
    empty = residual.sum(-1, keepdim=True) <= 0
    return accepted, torch.where(empty, target, residual)


def reject_certain(
    p: Tensor, first: Tensor, candidates: Tensor, lengths: Tensor, u: Tensor
) -> tuple[Tensor, Tensor]:
    """`reject` for candidates that were not drawn: each is its q's only mass.

    So y is accepted with probability p(y), and after a rejection the residual is p without y. What
    y is may depend on all that is known before the round, this row's and others' tokens among it.

    Args:
        p, first, candidates, lengths: as of `reject`.
        u: float64 [B, K] uniform numbers in [0, 1), independent of all that the candidates and
            their number depend on.
    """
    at = candidate_positions(first, lengths, candidates.shape[1])
    accepted = accepted_prefix(u < p[at, candidates], lengths)
    target = p[first + accepted]
    fallen = candidates.gather(1, accepted.clamp(max=candidates.shape[1] - 1)[:, None])
    without = target.scatter(1, fallen, 0.0)
    # Where rounding left p(y) just short of 1 nothing may be left: p is the right answer.
    left = (accepted < lengths) & (without.sum(-1) > 0)
    return accepted, torch.where(left[:, None], without, target)


class Matching:
    """`coupled` verification; greedy rows need no noise and take the same path in both modes."""

    def propose(
        self, logits: Tensor, params: SamplingBatch, at: Tensor | None, width: int = 1
    ) -> tuple[Tensor, None]:
        """Draw one candidate a row from draft logits [n, V] at output positions `at` int64 [n].

        Where all rows are greedy, positions have no say. With a `width` above 1 it is the best of
        so many siblings, int64 [n, width].
        """
        if width == 1:
            return _some_token(self._choose(logits, params, at)), None
        if params.all_greedy:
            return logits.topk(width).indices, None
        assert at is not None, "noise is drawn by positions"
        scores = coupled_scores(probabilities(logits, params), params.seed, at)
        best = scores.topk(width).indices
        if params.any_greedy:
            best = torch.where(params.greedy[:, None], logits.topk(width).indices, best)
        return best, None

    def verify(
        self,
        logits: Tensor,
        params: SamplingBatch,
        at: Tensor,
        first: Tensor,
        lengths: Tensor,
        proposal: Proposal,
    ) -> tuple[Tensor, Tensor]:
        """Accepted counts and bonus tokens, int64 [B] each, from packed target logits [M, V].

        Of a tree, the place of the last node that stands comes instead of a count (`Nodes`). A
        bonus token is NO_TOKEN where the target's logits that it is drawn from have no softmax.

        Args:
            params, at: sampling parameters and output positions of the M packed positions.
            first, lengths: where each row's positions begin, and how many candidates it submitted.
        """
        choices = self._choose(logits, params, at)
        if (nodes := proposal.nodes()) is not None:
            return match_tree(choices, first, nodes)
        return match(choices, first, proposal.candidates, lengths)

    def _choose(self, logits: Tensor, params: SamplingBatch, at: Tensor | None) -> Tensor:
        if params.all_greedy:
            return greedy_choice(logits)
        assert at is not None, "noise is drawn by positions"
        return coupled_choice(probabilities(logits, params), params.seed, at)


class RejectionSampling:
    """`rejection` verification; its parameters have the seeds of the round, see `in_round`."""

    def propose(
        self, logits: Tensor, params: SamplingBatch, at: Tensor | None, width: int = 1
    ) -> tuple[Tensor, Tensor]:
        """As `Matching.propose`; also returns the distributions [n, V] drawn from.

        Positions have no say where `params` has the numbers to draw by: [n, width] for siblings,
        which are drawn without replacement.
        """
        q = probabilities(logits, params)
        u = params.drawn
        if u is None:
            assert at is not None, "nothing to draw by"
            u = uniform(params.seed, at, Draw.CANDIDATE)
        if width == 1:
            return _some_token(sample(q, u)), q
        return _some_token(sample_distinct(q, u, logits.topk(width).indices)), q

    def verify(
        self,
        logits: Tensor,
        params: SamplingBatch,
        at: Tensor,
        first: Tensor,
        lengths: Tensor,
        proposal: Proposal,
    ) -> tuple[Tensor, Tensor]:
        """As `Matching.verify`."""
        p = probabilities(logits, params)
        seed, start = params.seed[first], at[first]
        if (nodes := proposal.nodes()) is not None:
            place, depth, residual = self._reject_tree(p, first, seed, start, proposal, nodes)
            return place, sample(residual, uniform(seed, start + depth, Draw.BONUS))
        candidates = proposal.candidates
        if not candidates.shape[1]:
            return torch.zeros_like(first), sample(p[first], uniform(seed, start, Draw.BONUS))
        steps = torch.arange(candidates.shape[1], device=at.device)
        u = uniform(seed[:, None], start[:, None] + steps, Draw.ACCEPT)
        drawn = proposal.distributions()
        if drawn is None:
            accepted, residual = reject_certain(p, first, candidates, lengths, u)
        else:
            accepted, residual = reject(
                p, first, *drawn, candidates, lengths, u, proposal.known_lengths()
            )
        return accepted, sample(residual, uniform(seed, start + accepted, Draw.BONUS))

    @staticmethod
    def _reject_tree(
        p: Tensor, first: Tensor, seed: Tensor, start: Tensor, proposal: Proposal, nodes: Nodes
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`reject_tree` with the round's numbers; see there."""
        depths, ranks = (torch.arange(n, device=p.device) for n in (nodes.depth, nodes.width))
        at = start[:, None, None] + depths[:, None]
        u = uniform(seed[:, None, None], at, Draw.ACCEPT, ranks)
        drawn = proposal.distributions()
        assert drawn is not None, "nodes were drawn"
        return reject_tree(p, first, *drawn, nodes, u)


def _some_token(candidates: Tensor) -> Tensor:
    """Candidates that models can be fed: token 0 for NO_TOKEN."""
    return candidates.clamp(min=0)


Mode = Matching | RejectionSampling
MODES: dict[str, Mode] = {"rejection": RejectionSampling(), "coupled": Matching()}
