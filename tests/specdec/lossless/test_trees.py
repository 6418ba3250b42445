"""Trees of candidates: the output has the target's distribution, and a broken walk is noticed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor

from specdec.lossless import trees, verification
from specdec.lossless.proposal import Nodes, TreeProposal
from specdec.lossless.sampling import Draw, sample_distinct, uniform
from specdec.lossless.trees import match_tree, reject_tree
from specdec.lossless.verification import MODES
from specdec.request import SamplingParams
from tests.specdec.goodness import chi_square_excess, counted, reference_distribution
from tests.specdec.lossless.markov import CPU, Markov, Prune, decode_two, decode_two_by_trees

SHAPES = {
    "a pair": (-1, -1),
    "four children": (-1, -1, -1, -1),
    "a comb": (-1, -1, 0, 0),
    "the second goes on": (-1, -1, -1, 1, 1, 2),
    "binary": (-1, -1, 0, 0, 1, 1),
    "once aside": (-1, -1, 0, 0, 1, 2, 2, 3, 4),
}
SAMPLINGS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.2, top_k=3),
    SamplingParams(temperature=1.5, top_p=0.9, min_p=0.05),
]


def excess(
    models: Markov,
    params: SamplingParams,
    mode: str,
    shape: str,
    prune: Prune | None = None,
    rows: int = 60_000,
) -> float:
    """The larger of two: of the first token, and of the first two jointly."""
    made = decode_two_by_trees(models, params, MODES[mode], SHAPES[shape], rows, prune)
    joint = models.first_two(params)
    first = chi_square_excess(counted(made.tokens[:, :1], models.vocab), joint.sum(1))
    return max(first, chi_square_excess(counted(made.tokens, models.vocab), joint))


FAR = Markov.random(5, seed=47, disagreement=3.0)
"""A draft that is so far from its target that second children matter."""


# ------------------------------------------------------------------ worked examples


def nodes_of(*rows: tuple[tuple[int, ...], tuple[int, ...]]) -> Nodes:
    """Trees of equally many nodes: parents and tokens of each row."""
    proposal = TreeProposal(len(rows), len(rows[0][0]), CPU)
    for row, (parents, tokens) in enumerate(rows):
        for parent, token in zip(parents, tokens, strict=True):
            proposal.grow([row], [parent], [1], torch.tensor([[token]]), None)
    nodes = proposal.nodes()
    assert nodes is not None
    return nodes


def test_the_walk_goes_to_the_child_that_the_target_chooses() -> None:
    """Children 5 and 7 of the root; 7 is chosen, then its child 2, then a token without a node.

    The other row's target chooses none of the root's children.
    """
    tree = (-1, -1, 0, 1, 1)
    nodes = nodes_of((tree, (5, 7, 1, 3, 2)), (tree, (5, 7, 4, 4, 4)))
    choices = torch.tensor([7, 1, 2, 9, 9, 6, 4, 9, 9, 9, 9, 9])
    place, bonus = match_tree(choices, torch.tensor([0, 6]), nodes)
    assert place.tolist() == [5, 0]
    assert bonus.tolist() == [6, 4]


def test_a_second_child_is_judged_by_what_the_first_has_left() -> None:
    """p = .2 .3 .5 and q = .5 .3 .2. Token 0 falls at u = .5, for p/q = .4.

    Left are p - q = 0 0 .3, that is token 2 for sure, and q = 0 .6 .4. So token 1 falls whatever
    its number, and leaves 0 0 1 - .4 of token 2.
    """
    p = torch.tensor([[0.2, 0.3, 0.5]]).expand(3, -1)
    q = torch.tensor([[0.5, 0.3, 0.2]])
    q_row = torch.zeros(1, 3, dtype=torch.int64)
    first = torch.zeros(1, dtype=torch.int64)
    u = torch.tensor([[[0.5, 0.0]]], dtype=torch.float64)
    place, depth, left = reject_tree(p, first, q, q_row, nodes_of(((-1, -1), (0, 1))), u)
    assert (place.item(), depth.item()) == (0, 0)
    torch.testing.assert_close(left / left.sum(), torch.tensor([[0.0, 0.0, 1.0]]))
    u[0, 0, 1] = 0.999  # token 2 in its place stands whatever its number
    place, depth, left = reject_tree(p, first, q, q_row, nodes_of(((-1, -1), (0, 2))), u)
    assert (place.item(), depth.item()) == (2, 1)
    assert torch.equal(left, p[2:])


def test_pruning_numbers_nodes_anew() -> None:
    proposal = TreeProposal(2, 5, CPU)
    one, other = torch.tensor([[5, 6], [1, 2]]), torch.tensor([[7, 8], [3, 4]])
    q = torch.tensor([[1.0], [2.0]])
    proposal.grow([0, 1], [-1, -1], [2, 1], one, q)
    proposal.grow([0, 0], [0, 1], [1, 2], other, q + 2)
    assert proposal.parents == [[-1, -1, 0, 1, 1], [-1]]
    assert proposal.candidates.tolist() == [[5, 6, 7, 3, 4], [1, 0, 0, 0, 0]]
    assert proposal.path(0, 5) == [1, 4] and proposal.path(1, 0) == []
    pruned = proposal.of([[0, 1, 3], []])
    assert (pruned.parents, pruned.lengths) == ([[-1, -1, 1], []], [3, 0])
    assert pruned.candidates.tolist() == [[5, 6, 3], [0, 0, 0]]
    assert pruned.path(0, 3) == [1, 2] and list(pruned.depths(0)) == [1, 1, 2]
    drawn, nodes = pruned.distributions(), pruned.nodes()
    assert drawn is not None and nodes is not None
    assert [drawn[0][drawn[1][0, place]].item() for place in (0, 2)] == [1, 4]
    assert nodes.children[0].tolist() == [[1, 2], [0, 0], [3, 0], [0, 0]]
    assert proposal.of([[], []]).nodes() is None


def test_numbers_of_branches_differ_and_the_first_is_that_of_a_chain() -> None:
    seed, at = torch.arange(50)[:, None, None], torch.arange(20)[:, None]
    numbers = torch.stack([uniform(seed, at, draw, torch.arange(9)) for draw in Draw])
    assert numbers.unique().numel() == numbers.numel()
    chain = [uniform(seed[..., 0], at[:, 0], draw) for draw in Draw]
    assert torch.equal(numbers[..., 0], torch.stack(chain))


# ------------------------------------------------------------------------------ laws


@pytest.mark.statistical
def test_children_are_drawn_without_replacement() -> None:
    """All 60 ordered triples of five tokens, 200,000 draws; false alarm 1e-6."""
    n, p = 200_000, torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    u = uniform(torch.arange(n)[:, None], torch.zeros(1).long(), Draw.CANDIDATE, torch.arange(3))
    drawn = sample_distinct(p.expand(n, -1), u, torch.zeros(n, 3).long())
    expected = torch.zeros(5, 5, 5, dtype=torch.float64)
    for a, b, c in permutations(range(5), 3):
        expected[a, b, c] = p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b])
    assert chi_square_excess(counted(drawn, 5), expected) < 1


def test_what_cannot_be_drawn_is_given() -> None:
    probs = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0], [torch.nan, 0.0, 0.0]])
    u = torch.full((3, 3), 0.6, dtype=torch.float64)
    spare = torch.tensor([[1, 2, 0]]).expand(3, -1)
    assert sample_distinct(probs, u, spare).tolist() == [[1, 2, 0], [1, 0, 0], [-1, -1, -1]]


@pytest.mark.statistical
@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("params", SAMPLINGS, ids=str)
def test_output_has_the_targets_distribution(mode: str, shape: str, params: SamplingParams) -> None:
    """Also where a draft has fewer tokens left than a node has children; false alarm 1e-6 each."""
    assert excess(Markov.random(5, seed=40), params, mode, shape) < 1


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
def test_a_chain_is_a_tree(mode: str) -> None:
    """To the last token: a tree without branches draws and judges by the same numbers."""
    models, params = Markov.random(6, seed=41), SamplingParams(top_p=0.9)
    chain = decode_two(models, params, MODES[mode], 3, rows=5000)
    tree = decode_two_by_trees(models, params, MODES[mode], (-1, 0, 1), 5000)
    assert torch.equal(chain.tokens, tree.tokens)
    assert (chain.verified, chain.accepted) == (tree.verified, tree.accepted)


@pytest.mark.parametrize("shape", SHAPES)
def test_coupled_tokens_are_the_same_for_any_tree(shape: str) -> None:
    models, params = Markov.random(7, seed=23), SamplingParams(temperature=1.1, top_p=0.95)
    plain = decode_two(models, params, MODES["coupled"], 0, rows=5000).tokens
    tree = decode_two_by_trees(models, params, MODES["coupled"], SHAPES[shape], 5000)
    assert torch.equal(tree.tokens, plain)


@pytest.mark.parametrize("mode", ["rejection", "coupled"])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_rows_walk_along_the_argmax(mode: str, shape: str) -> None:
    models, params = Markov.random(6, seed=42), SamplingParams(temperature=0)
    made = decode_two_by_trees(models, params, MODES[mode], SHAPES[shape], 10)
    plain = decode_two(models, params, MODES[mode], 0, rows=10)
    assert torch.equal(made.tokens, plain.tokens)
    # The draft's first choices, not what was drawn without a chance: two of three are right here.
    assert made.accepted > 0


@pytest.mark.statistical
def test_siblings_stand_as_often_as_theory_says() -> None:
    """Of 100,000 pairs of children; five standard deviations, so false alarm 6e-7 a side."""
    table, n = Markov.random(5, seed=43), 100_000
    # Every context alike, so that pairs of second rounds have the same acceptance.
    models = Markov(table.target[:1].expand(5, -1), table.draft[:1].expand(5, -1))
    params, tables = SamplingParams(), (models.target, models.draft)
    p, q = (reference_distribution(logits[0], params) for logits in tables)
    left, stands = (p - q).clamp(min=0), torch.minimum(p, q).sum()
    left /= left.sum()
    for y in range(5):  # the one that fell
        rest = q.clone()
        rest[y] = 0
        second = torch.minimum(left, rest / rest.sum()).sum()
        stands = stands + (q[y] - p[y]).clamp(min=0) * second
    made = decode_two_by_trees(models, params, MODES["rejection"], SHAPES["a pair"], n)
    rounds = made.verified / 2
    assert abs(made.accepted / rounds - stands) < 5 * (0.25 / rounds) ** 0.5


def test_an_accelerator_walks_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes all rows where a CPU picks some."""
    models, params = Markov.random(5, seed=46), SamplingParams(top_k=3)

    def run() -> Tensor:
        shape = SHAPES["once aside"]
        return decode_two_by_trees(models, params, MODES["rejection"], shape, 5000).tokens

    picked = run()
    monkeypatch.setattr(trees, "where", trees.every)
    assert torch.equal(run(), picked)


# ------------------------------------------------------------------------- what may be dropped


LEGAL: dict[str, Prune] = {
    "by its parent": Prune(lambda y: y[:, 0] != 1, (0, 1)),
    "by its better sibling": Prune(lambda y: y[:, 2] != 1, (0, 1, 2)),
    "by its cousin": Prune(lambda y: y[:, 2] != 1, (0, 1, 2, 3)),
}
ILLEGAL: dict[str, Prune] = {
    "by itself": Prune(lambda y: y[:, 1] != 1, (0, 2, 3)),
    "by its child": Prune(lambda y: y[:, 5] != 1, (0, 2, 3)),
    "a better sibling alone": Prune(lambda y: y[:, 0] != 1, (1, 4, 5)),
}
"""The second sibling of two without its first was drawn from what that left, and is judged so."""


@pytest.mark.statistical
@pytest.mark.parametrize("why", [*LEGAL, *ILLEGAL])
def test_a_node_may_be_dropped_by_what_was_known_before_it_was_drawn(why: str) -> None:
    """Matching modes drop what they like. False alarm 1e-6 for what is legal."""
    prune = {**LEGAL, **ILLEGAL}[why]
    found = excess(FAR, SamplingParams(), "rejection", "binary", prune)
    assert (found < 1) == (why in LEGAL)
    assert excess(FAR, SamplingParams(), "coupled", "binary", prune) < 1


# ----------------------------------------------------------------------- would we notice?


Update = Callable[[Tensor, Tensor], Tensor]


def walk_with(
    left_of: Update = lambda p, q: (p - q).clamp(min=0),
    without: Callable[[Tensor, Tensor], Tensor] = lambda q, y: q.scatter(1, y, 0.0),
    order: Callable[[int], range] = range,
    number: Callable[[Tensor], Tensor] = lambda u: u,
    level: int | None = None,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`reject_tree` written plainly, with its ingredients open to damage."""

    def mutant(
        p: Tensor, first: Tensor, q: Tensor, q_row: Tensor, nodes: Nodes, u: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        u, row = number(u), torch.arange(len(first))
        place, depth, going = torch.zeros_like(first), torch.zeros_like(first), first >= 0
        residual = p[first].double()
        for at in range(nodes.depth):
            children, here = nodes.children[row, place], q[q_row[row, place]].double()
            stood = torch.zeros_like(going)
            for rank in order(nodes.width):
                child = children[:, rank : rank + 1]
                y = nodes.tokens.gather(1, child)
                here = torch.where(here.sum(1, keepdim=True) > 0, here, here.scatter(1, y, 1.0))
                here = here / here.sum(1, keepdim=True)
                left = residual / residual.sum(1, keepdim=True)
                tried = going & ~stood & (child[:, 0] > 0)
                ok = u[:, at if level is None else level, rank, None] * here.gather(
                    1, y
                ) < left.gather(1, y)
                stands, falls = tried & ok[:, 0], tried & ~ok[:, 0]
                rest = left_of(left, here)
                rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, left)
                residual = torch.where(falls[:, None], rest, residual)
                here = without(here, y)
                place, stood = torch.where(stands, child[:, 0], place), stood | stands
            depth, going = depth + stood, stood
            residual = torch.where(stood[:, None], p[first + place].double(), residual)
        return place, depth, residual.float()

    return mutant


MUTANTS = {
    "p is left as it is": walk_with(left_of=lambda p, q: p),
    "what is left is |p - q|": walk_with(left_of=lambda p, q: (p - q).abs()),
    "siblings are judged as if drawn anew": walk_with(without=lambda q, y: q),
    "the last sibling is judged first": walk_with(order=lambda width: range(width)[::-1]),
    "an accept number is used for two siblings": walk_with(
        number=lambda u: u[..., :1].expand_as(u)
    ),
    "an accept number is used at two depths": walk_with(level=0),
}


@pytest.mark.statistical
@pytest.mark.parametrize("shape", ["a pair", "binary"])
def test_the_harness_passes_an_unbroken_walk(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    monkeypatch.setattr(verification, "reject_tree", walk_with())
    assert excess(FAR, SamplingParams(), "rejection", shape) < 1


@pytest.mark.statistical
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_walk_is_noticed(monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    monkeypatch.setattr(verification, "reject_tree", MUTANTS[mutant])
    assert excess(FAR, SamplingParams(), "rejection", "binary") > 1


@pytest.mark.statistical
def test_one_random_number_for_all_siblings_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = verification.sample_distinct

    def same_for_all(probs: Tensor, u: Tensor, spare: Tensor) -> Tensor:
        return honest(probs, u[:, :1].expand_as(u), spare)

    monkeypatch.setattr(verification, "sample_distinct", same_for_all)
    assert excess(FAR, SamplingParams(), "rejection", "binary") > 1
