"""Trees in one forward against each of their paths, decoded alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM

from specdec.model.decoder import PackedDecoder
from specdec.model.packing import GRID_TOKENS
from specdec.model.rows import PackedRow
from specdec.model.trees import MOST_NODES, Tree, lay_out, positions_of
from tests.specdec.recurrent_models import RECURRENT
from tests.specdec.tiny_models import VOCAB, make_pair, seeded, tiny_model

WINDOW = 5
"""Less than trees are deep: it ends within them."""

LAYERS = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "layer_types": LAYERS, "attn_logit_softcapping": 1.0},
    "gpt_oss": {
        "sliding_window": WINDOW,
        "layer_types": LAYERS,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
}


def a_tree(nodes: int, draw: random.Random) -> list[int]:
    """Parents of random nodes, of which many have several children and some paths are long."""
    return [max(-1, node - 1 - draw.choice([0, 0, 0, 1, 1, 2, 5, 40])) for node in range(nodes)]


def path_to(parents: list[int], node: int) -> list[int]:
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


class TreeBench:
    """Slots with prompts of several lengths, on pages in any order; slot 4 is for single paths."""

    def __init__(
        self, decoder: PackedDecoder, prompts: tuple[int, ...] = (3, 30, 127, 150)
    ) -> None:
        self.decoder, self.draw = decoder, random.Random(0)
        self.cache = decoder.new_cache(5, 384)
        self.draw.shuffle(self.cache.pages._free)
        self.texts = [self.tokens(n) for n in prompts]
        for slot, text in enumerate(self.texts):  # all but their last tokens, which go with nodes
            decoder.forward(self.cache, [(slot, len(text) - 1)], torch.tensor(text[:-1]))

    def tokens(self, n: int) -> list[int]:
        return [self.draw.randrange(VOCAB) for _ in range(n)]

    def check(self, trees: dict[int, tuple[list[int], int]], *, bits: bool) -> None:
        """Feed trees in two forwards; what comes out for a node is what its path gives alone.

        Then some path of each is kept, and a node of no tree is among the next tokens.

        Args:
            trees: by slot, parents of all nodes and how many of them are in the first forward.
        """
        nodes = {slot: self.tokens(len(parents)) for slot, (parents, _) in trees.items()}
        bases = {slot: len(self.texts[slot]) for slot in trees}
        found: dict[int, list[Tensor]] = {slot: [] for slot in trees}
        for forward in (0, 1):
            rows, fed, asked = [], [], list[Tree | None]()
            for slot, (parents, first) in trees.items():
                parts = [[self.texts[slot][-1], *nodes[slot][:first]], nodes[slot][first:]]
                if not parts[forward]:
                    continue
                rows.append((slot, len(parts[forward])))
                fed += parts[forward]
                known = parents if forward else parents[:first]
                asked.append(Tree(bases[slot], known) if known else None)
            hidden = self.decoder.forward(self.cache, rows, torch.tensor(fed), asked).clone()
            for (slot, _), part in zip(rows, hidden.split([n for _, n in rows]), strict=True):
                found[slot].append(part)
        for slot, (parents, _) in trees.items():
            together = torch.cat(found[slot])
            leaves = sorted(set(range(len(parents))) - set(parents))
            some = self.draw.sample(leaves, min(len(leaves), 4))
            for path in [path_to(parents, leaf) for leaf in some] or [[]]:
                alone = self.alone(slot, [nodes[slot][node] for node in path])
                expected = together[[0, *(1 + node for node in path)]]
                torch.testing.assert_close(alone, expected, atol=2e-4, rtol=2e-4)
                assert not bits or torch.equal(alone, expected)
        kept = {
            slot: path_to(parents, self.draw.randrange(len(parents))) if parents else []
            for slot, (parents, _) in trees.items()
        }
        self.cache.keep(list(kept), [bases[slot] for slot in kept], list(kept.values()))
        for slot, path in kept.items():
            self.texts[slot] += [nodes[slot][node] for node in path]
            assert self.cache.lengths[slot] == len(self.texts[slot])
            self.texts[slot] += self.tokens(1)
            last = torch.tensor(self.texts[slot][-1:])
            after = self.decoder.forward(self.cache, [(slot, 1)], last).clone()
            self.cache.rollback(slot, len(self.texts[slot]) - 1)
            again = self.alone(slot, [], since=bases[slot] - 1)[-1:]
            torch.testing.assert_close(after, again, atol=2e-4, rtol=2e-4)
            assert not bits or torch.equal(after, again)

    def alone(self, slot: int, path: list[int], since: int | None = None) -> Tensor:
        """Hidden states [1 + path, hidden] of a row's last token and a path, one at a time.

        `since`: from which token on, in place of the last one.
        """
        text, cache = self.texts[slot], self.cache
        since = len(text) - 1 if since is None else since
        cache.fork(slot, [4], [since])
        outs = [
            self.decoder.forward(cache, [(4, 1)], torch.tensor([token])).clone()
            for token in [*text[since:], *path]
        ]
        return torch.cat(outs)


def some_trees(draw: random.Random) -> dict[int, tuple[list[int], int]]:
    """In a batch: a wide tree, one of more nodes than a grid row has tokens, a chain, and none."""
    return {
        2: (a_tree(GRID_TOKENS + 8, draw), 5),
        0: ([-1, -1, -1, 0, 0, 1, 3, 6, 7, 8, 9, 4], 3),
        3: ([-1, 0, 1, 2, 3, 4], 6),
        1: ([], 0),
    }


@pytest.mark.parametrize("invariant", [False, True], ids=["", "invariant"])
@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trees_nodes_are_what_their_paths_give_alone(
    family: str, kernels: bool, invariant: bool
) -> None:
    # Heads of 8 numbers are none that the compiled kernels take.
    model = tiny_model(family, heads=4 if kernels else 8, **FAMILIES[family])
    if hasattr(model.model.layers[0].self_attn, "sinks"):
        for layer in model.model.layers:
            layer.self_attn.sinks.data = torch.linspace(-1, 3, len(layer.self_attn.sinks))
    decoder = make_pair(model, None, precision="float32", invariant=invariant).target
    bench = TreeBench(decoder)
    for _ in range(2):
        bench.check(some_trees(bench.draw), bits=invariant and family != "gpt_oss")


def test_a_bias_of_positions_is_that_of_a_nodes_depth() -> None:
    config = BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, seq_length=512)
    bench = TreeBench(PackedDecoder(seeded(BloomForCausalLM, config).eval()))
    bench.check(some_trees(bench.draw), bits=False)


def test_as_many_nodes_as_a_mask_has_bits() -> None:
    bench = TreeBench(make_pair(tiny_model(heads=8), None).target)
    bench.check({1: (list(range(-1, MOST_NODES - 1)), 9)}, bits=False)
    bench.check({1: (a_tree(MOST_NODES, bench.draw), 60)}, bits=False)


@pytest.mark.parametrize("parents", [[-1, 1], [0], [-2], [-1] * (MOST_NODES + 1)])
def test_a_tree_that_is_none_is_refused(parents: list[int]) -> None:
    with pytest.raises(ValueError, match=r"children|at most"):
        Tree(3, parents)


def test_states_that_run_on_do_not_branch() -> None:
    decoder = PackedDecoder(tiny_model("qwen3_5_text", **RECURRENT["qwen3_5_text"]))
    with pytest.raises(ValueError, match="chains"):
        decoder.forward(decoder.new_cache(1, 8), [(0, 2)], torch.arange(2), [Tree(1, [-1])])


def test_tokens_lie_at_their_depths() -> None:
    rows = [PackedRow(0, 2, 3, 5), PackedRow(2, 5, 0, 8), PackedRow(7, 1, 1, 12)]
    trees = [None, Tree(10, [-1, 0, 0]), Tree(11, [-1, -1])]
    positions, bases, masks = lay_out(rows, trees)
    assert positions == [5, 6, 8, 9, 10, 11, 11, 11]
    assert bases == [6, 7, 9, 10, 10, 10, 10, 11]
    assert masks == [0, 0, 0, 0, 0b1, 0b11, 0b101, 0b10]
    seen = positions_of(torch.tensor([bases, masks]), 14)
    for token, position in enumerate(positions):
        own = [bases[token] + bit for bit in range(MOST_NODES) if masks[token] >> bit & 1]
        visible = (seen[token] <= position).nonzero()[:, 0].tolist()
        assert visible == [*range(bases[token]), *own]
        assert seen[token, visible].tolist() == list(range(position + 1))
    with pytest.raises(ValueError, match="ends at 13"):
        lay_out(rows[1:2], [Tree(10, [-1])])
