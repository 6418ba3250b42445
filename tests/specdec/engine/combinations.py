"""Random combinations of what an engine can be asked, each of them by a seed alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from llguidance import LLMatcher
from transformers import PreTrainedModel

from specdec.drafters.corpus import Corpus, build_corpus
from specdec.kernels.stored import KvDtype
from specdec.loading.grammars import ModelGrammars
from specdec.policies.base import StopPolicy
from specdec.policies.registry import make_policy
from specdec.policies.simple import Fixed
from specdec.request import PROCESSED, Request, SamplingParams
from tests.specdec.eagle_drafts import (
    Shape,
    eagle_pair,
    fitted_weights,
    foreseeable_target,
    random_weights,
    save,
)
from tests.specdec.engine.test_grammars import tokenizer
from tests.specdec.engine.test_growing import growing
from tests.specdec.engine.test_trees import Wild
from tests.specdec.recurrent_models import recurrent_model
from tests.specdec.tiny_models import Precision, TinyPair, make_pair, noisy_copy, tiny_model
from tests.specdec.workloads import POLICIES, Leading, Prompt, looking_goodput, make

LETTERS = "abcdefghijklmnopqrstuvwxyz0123"
EOS = len(LETTERS)
VOCAB = EOS + 1
GRAMMARS = ModelGrammars(tokenizer(LETTERS), VOCAB, [EOS])

PATTERNS = (
    "[a-m]{3,9}",
    "(ab|ba)cdef(g|h)ijk",
    "abcabcabc[a-z]{0,4}",
    "[a-c](d|e[f-i]g)[h-k]{1,6}",
    "([a-e]{2}x){1,5}",
    "(abcd){1,6}",
    "[a-z0-3]*",
    "a",
    "(cat|dog|bird)",
    "[a-p]+zz?",
    "(aaaa|aaab)[ab]{2}",
)
RULES = 'start: "ab" (ITEM "xy")* "q"\nITEM: /[a-f]{1,3}/\n'
TEXTS = [*map(LLMatcher.grammar_from_regex, PATTERNS), LLMatcher.grammar_from_lark(RULES)]
"""Grammars that requests have."""

FAILING = 0.05
"""Share of requests that allow no token, so that their rows fail beside the others."""

Draft = Literal["none", "model", "eagle", "recurrent"]
Policies = dict[str, Callable[[random.Random, int], StopPolicy]]
"""By name: random numbers and the draft's hidden size -> a policy."""


def _named(name: str) -> Callable[[random.Random, int], StopPolicy]:
    return lambda _, width: make(name, width)


LOOKING: Policies = {
    "suffix": lambda *_: make("suffix"),
    "suffix of anything": lambda rng, _: make_policy(
        "suffix", threshold=0.02, k_max=rng.choice([1, 4, 64])
    ),
    "suffix of what is likely": lambda *_: make_policy("suffix", threshold=0.9, k_max=8),
}
TREES: Policies = {
    "fixed tree": lambda rng, _: Fixed(rng.choice([1, 2, 4, 8]), rng.choice([2, 3, 4])),
    "wild tree": lambda rng, _: Wild(
        rng.randrange(99), rng.choice([2, 3, 4]), rng.choice([5, 20, 64])
    ),
    "growing": lambda rng, _: growing(rng.choice([2, 3, 4])),
}
CHAINS: Policies = {
    # What `goodput` does depends on how busy the machine is; `goodput stated` is the same each run.
    **{name: _named(name) for name in POLICIES if name != "goodput"},
    "leading": lambda rng, _: Leading(
        budgets=tuple(rng.randrange(6) for _ in range(3)),
        submissions=(99, rng.randrange(4)),
        unlikely_stop=rng.random() < 0.4,
    ),
}
ALONE: Policies = LOOKING | {"looking goodput": lambda *_: looking_goodput()}
"""Those that need no draft."""

DRAFTING: Policies = CHAINS | LOOKING | TREES


@dataclass(frozen=True)
class Models:
    """A pair, by what it is made from.

    Attributes:
        peak: factor on the target's LM head.
        noise: of a draft that is nearly the target; of no draft or EAGLE it means nothing.
        fitted: whether an EAGLE draft is good.
        known: tokens that an EAGLE draft can propose; None: all.
    """

    draft: Draft
    family: str
    seed: int
    peak: float
    noise: float
    fitted: bool
    known: int | None
    precision: Precision
    invariant: bool
    kv_dtype: KvDtype

    @property
    def context(self) -> int:
        return 256 if self.draft == "eagle" else 160

    @property
    def width(self) -> int:
        """The draft's hidden size."""
        if self.draft == "eagle":
            return 128 if self.fitted else 64
        return 32

    def pair(self) -> TinyPair:
        options: dict[str, Any] = {
            "eos": frozenset({EOS}),
            "precision": self.precision,
            "invariant": self.invariant,
            "kv_dtype": self.kv_dtype,
        }
        target = self._target()
        if self.draft == "eagle":
            shape = Shape(hidden=self.width, bias=self.fitted, vocab=VOCAB, draft_vocab=self.known)
            weights = (
                fitted_weights(shape, target) if self.fitted else random_weights(shape, self.seed)
            )
            with TemporaryDirectory() as folder:
                draft = save(Path(folder) / "draft", shape, weights, "speculators")
                return eagle_pair(target, draft, **options)
        near = noisy_copy(target, self.noise) if self.draft != "none" else None
        return make_pair(target, near, **options)

    def _target(self) -> PreTrainedModel:
        sizes: dict[str, Any] = {"vocab": VOCAB, "peak": self.peak, "seed": self.seed}
        sizes["context"] = self.context
        if self.draft == "recurrent":
            return recurrent_model(self.family, hidden=32, **sizes)
        if self.draft != "eagle":
            return tiny_model(self.family, hidden=32, **sizes)
        return foreseeable_target(self.family, **sizes)


@dataclass(frozen=True)
class Combination:
    """All that a seed draws but the requests: `requests` makes those.

    Attributes:
        requests: how many.
        greedy: whether only greedy requests are among them.
        corpus: what is in the corpus: what the target will say, the same with
            other tokens in between, or anything.
        pages: so few in memory that rows wait and are sent back; None: plenty.
        beside: whether draft steps run ahead, as beside a GPU.
        waves: of each run of all requests, whether they come in between steps.
    """

    seed: int
    models: Models
    policy: str
    verification: Literal["coupled", "rejection"]
    requests: int
    greedy: bool
    corpus: Literal["own", "mixed", "noise"] | None
    lookup: bool | None
    slots: int
    prefill_chunk: int
    least_shared: int
    control_share: float
    trace: bool
    pages: int | None
    beside: bool
    waves: tuple[bool, ...]

    def chance(self, purpose: object) -> random.Random:
        """Random numbers that depend on the seed and what they are for."""
        return random.Random(f"{self.seed} {purpose}")

    def new_policy(self) -> StopPolicy:
        return (ALONE | DRAFTING)[self.policy](self.chance("policy"), self.models.width)

    def kinds(self) -> set[str]:
        """Which of the parts that are hard to combine it has."""
        policy, draft = self.new_policy(), self.models.draft
        return {
            kind
            for kind, met in {
                "tree": self.policy in TREES and draft in ("model", "eagle"),
                "grammar": any(each.sampling.grammar for each in requests(self)),
                "corpus": self.corpus and self.lookup is not False and policy.looks_up,
                "eagle": draft == "eagle" and policy.drafts,
                "recurrent": draft == "recurrent" and policy.drafts,
                "short memory": self.pages is not None,
                "rounded cache": self.models.kv_dtype == "int8",
                "rejection": self.verification == "rejection",
            }.items()
            if met
        }


# ---------------------------------------------------------------------------- from a seed


def draw(seed: int) -> Combination:
    rng = random.Random(seed)
    models = _models(rng)
    verification: Literal["coupled", "rejection"]
    verification = rng.choice(["coupled", "coupled", "rejection"])
    recurrent = models.draft == "recurrent"
    return Combination(
        seed=seed,
        models=models,
        verification=verification,
        requests=rng.randrange(1, 10 if recurrent else 18),
        greedy=verification == "rejection" and rng.random() < 0.7,
        corpus=rng.choice([None, None, None, "own", "mixed", "noise"]),
        lookup=rng.choice([None, True, True, False]),
        slots=rng.choice([1, 2, 3, 5, 8, 16, 32]),
        prefill_chunk=rng.choice([8, 64, 128, 512]),
        least_shared=rng.choice([2, 32, 32]),
        control_share=rng.choice([0, 0, 0.3]),
        trace=rng.random() < 0.5,
        pages=None if recurrent or rng.random() < 0.7 else rng.choice([4, 5, 7]),
        beside=rng.random() < 0.3,
        waves=tuple(rng.random() < 0.4 for _ in range(rng.choice([1, 2]))),
        policy=_policy(rng, models.draft),  # last: a new policy changes nothing else
    )


def _models(rng: random.Random) -> Models:
    drafts: dict[Draft, int] = {"none": 2, "model": 3, "eagle": 2, "recurrent": 1}
    (draft,) = rng.choices([*drafts], [*drafts.values()])
    families = {
        "eagle": ["llama"],
        "recurrent": ["qwen3_next", "lfm2", "falcon_h1", "mamba2"],
    }
    rounded = draft != "recurrent" and rng.random() < 0.2
    invariant = draft != "recurrent" and (rounded or rng.random() < 0.4)
    precisions: list[Precision] = ["float32", "int8wo", "int8"] if invariant else ["plain"]
    return Models(
        draft=draft,
        family=rng.choice(families.get(draft, ["llama", "qwen3"])),
        seed=rng.randrange(1000),
        peak=rng.choice([15.0, 30.0, 60.0]),
        noise=rng.choice([0.0, 0.05, 0.3]),
        fitted=rng.random() < 0.7,
        known=rng.choice([None, 20]),
        precision=rng.choice(precisions),
        invariant=invariant,
        kv_dtype="int8" if rounded else "auto",
    )


def _policy(rng: random.Random, draft: Draft) -> str:
    if draft == "none":
        return rng.choice([*ALONE])
    return rng.choice([*DRAFTING, *[*TREES, "leading", "goodput stated"] * 3])


def requests(of: Combination, said: Sequence[Prompt] = ()) -> list[Request]:
    """What a combination asks.

    Args:
        said: outputs of the target, which stop strings and bad words are cut from, so that they
            are met. Without them, everything else is the same.
    """
    rng, pool, made = of.chance("prompts"), list[Prompt](), []
    for i in range(of.requests):
        prompt = _prompt(rng, pool, of.models.context)
        pool += [prompt] if prompt else []
        sampling = _sampling(of.chance(i), i, of.greedy, said)
        if of.chance(f"{i} fails").random() < FAILING:
            sampling = replace(sampling, allowed_token_ids=(i,), bad_words=((i,),))
        made.append(Request(f"r{i}", prompt, sampling))
    return made


def _prompt(rng: random.Random, pool: Sequence[Prompt], context: int) -> Prompt:
    """One that was there before, a longer one, one that repeats itself, or any; or none at all."""
    kind = rng.random()
    if kind < 0.03:
        return ()
    if kind < 0.3 and pool:
        return rng.choice(pool)
    if kind < 0.5 and pool:
        return (*rng.choice(pool), *_tokens(rng, rng.randrange(1, 6)))
    short, edges = [1, 2, 3, 7, 12], [31, 32, 33, 40, 64, 65, 90]
    n = rng.choice([*short, *edges, context - 30, context - 3, context - 1, context])
    if kind < 0.7:
        return (_tokens(rng, rng.randrange(1, 6)) * n)[:n]
    return _tokens(rng, n)


def _tokens(rng: random.Random, n: int) -> Prompt:
    return tuple(rng.randrange(VOCAB) for _ in range(n))


def _sampling(rng: random.Random, i: int, greedy: bool, said: Sequence[Prompt]) -> SamplingParams:
    """What is cut from `said` comes last, so that nothing else depends on it."""
    most = rng.choice([1, 1, 2, 3, 8, 16, 24, 40])
    hot = not greedy and rng.random() < 0.55
    asked: dict[str, Any] = {
        "max_new_tokens": most,
        "seed": rng.choice([0, i, i, i]),
        "temperature": rng.choice([0.3, 0.7, 1.0, 1.5]) if hot else 0.0,
    }
    wild = rng.random() < 0.7
    grammar = rng.choice(TEXTS)
    if rng.random() < (0.25 if wild else 0.05):
        asked["grammar"] = grammar
    if not wild:
        return SamplingParams(**asked)
    some: dict[str, tuple[float, Callable[[], Any]]] = {
        "top_k": (0.25, lambda: rng.choice([1, 2, 5])),
        "top_p": (0.25, lambda: rng.choice([0.5, 0.9])),
        "min_p": (0.15, lambda: rng.choice([0.05, 0.5, 1.0])),
        "repetition_penalty": (0.25, lambda: rng.choice([0.7, 1.3, 2.0])),
        "presence_penalty": (0.25, lambda: rng.choice([-1.5, 1.0, 2.0])),
        "frequency_penalty": (0.25, lambda: rng.choice([-1.0, 0.5, 2.0])),
        "logit_bias": (0.25, lambda: {t: rng.choice([-100, -3.0, 4.0, 100]) for t in few(3)}),
        "no_repeat_ngram_size": (0.25, lambda: rng.choice([1, 2, 3, 5, 64])),
        "allowed_token_ids": (0.2, lambda: tuple(rng.sample(range(VOCAB), rng.choice([1, 8, 20])))),
        "min_tokens": (0.25, lambda: rng.randrange(most + 1)),
        "stop_token_ids": (0.25, lambda: few(2)),
        "ignore_eos": (0.15, lambda: True),
        "logprobs": (0.25, lambda: rng.choice([0, 1, 5])),
        "prompt_logprobs": (0.12, lambda: rng.choice([0, 3])),
        "logprobs_mode": (0.4, lambda: PROCESSED),
        "bad_words": (0.3, lambda: tuple(cut() for _ in range(rng.randrange(1, 4)))),
        "stop": (0.3, lambda: tuple(decode(cut()) for _ in range(rng.randrange(1, 3)))),
    }

    def few(n: int) -> Prompt:
        return _tokens(rng, rng.randrange(1, n + 1))

    def cut() -> Prompt:
        """A few tokens of an output, so that it is met, or any."""
        text = rng.choice(said) if said and rng.random() < 0.7 else ()
        if len(text) < 2:
            return few(3)
        at = rng.randrange(len(text) - 1)
        return text[at : at + rng.randrange(1, 5)]

    asked |= {name: value() for name, (chance, value) in some.items() if rng.random() < chance}
    return SamplingParams(**asked)


def corpus(of: Combination, said: Sequence[Prompt], folder: Path) -> Corpus | None:
    """The corpus that candidates are looked up in, of what the target said or not."""
    if of.corpus is None:
        return None
    rng = of.chance("corpus")
    texts = [list(text) for text in said if len(text) > 2] if of.corpus != "noise" else []
    if of.corpus != "own" or not texts:
        texts += [list(_tokens(rng, 200)) for _ in range(5)]
    if of.corpus == "mixed":
        texts = [[*text[:3], rng.randrange(VOCAB), *text[3:]] for text in texts]
    file = folder / "corpus"
    build_corpus(texts, file, "t")
    return Corpus(file, "t")


def decode(ids: Sequence[int]) -> str:
    """A character for each token."""
    return "".join((LETTERS + "$")[i] for i in ids)
