"""Candidates that are looked up, with and without a draft model, against plain decoding.

    python benchmarks/suffix.py --batch 16 --repeats 3
    python benchmarks/suffix.py --work samples --prompts questions.parquet --rows 64 --batch 64
    python benchmarks/suffix.py --work samples,free --draft examples/demo/draft
    python benchmarks/suffix.py --work night --rows 64

Four kinds of work, each as large as `--rows` says:

    samples   four samples of each prompt at temperature 0.7
    extract   JSON that quotes from its prompt, greedily: made-up orders, one template
    free      one sample of each prompt at temperature 1: text that hardly repeats itself
    night     the second night of a recipe, at temperature 0.7: the template and the seeds of
              examples/nightly, of which half come again. What `none` wrote in the first night,
              outside of all timing, is the corpus.

and three sides, a few steps each in turns, `--repeats` times over: `none`, `suffix` and `goodput`,
both without a draft; with `--draft` also `goodput` with it, once with nothing looked up (`draft`)
and once with both (`both`). The second night has `suffix` without the corpus and with it, and with
it `goodput` and `both`. Verification is `coupled`, so that all sides have the same tokens to
generate, to their natural ends: of candidates that nobody drew it accepts as many as `rejection`.

Prints how many times faster than `none` a side is in tokens per second (the median of the paired
ratios, with the smallest and largest), how many candidates were verified for each token of output,
how many of them were accepted, how many of these were found in the corpus, tokens that a row gets
in a round, and what share of the time looking up and deciding took. What a
candidate costs beside that is said by the last column: how much longer a round of twice as many
tokens as rows takes, as profiled and as `goodput` found it. Some 10 minutes on two cores with the
defaults.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import (
    PROMPTS,
    ROOT,
    TARGET,
    Precision,
    Prompts,
    Repeats,
    Rows,
    Target,
    Threads,
    Tokens,
    console,
    load,
    prepare,
    race,
    ratios,
    read_prompts,
    run,
    spread,
)
from rich.table import Table

from pipeline.generate.corpus import corpus_tokens, tokenizer_mark
from pipeline.texts import Texts
from specdec.drafters.corpus import Corpus, build_corpus
from specdec.engine.engine import Engine
from specdec.loading.pair import ModelPair
from specdec.policies.costs import CostModel
from specdec.policies.profiling import profile_costs
from specdec.policies.registry import make_policy
from specdec.request import Request, SamplingParams

WITHOUT_DRAFT = ("none", "suffix", "goodput")
WITH_DRAFT = ("draft", "both")
WITH_CORPUS = " + corpus"
WITH_DRAFT_AND_CORPUS = ("draft", f"both{WITH_CORPUS}")
SECOND_NIGHT = ("none", "suffix", f"suffix{WITH_CORPUS}", f"goodput{WITH_CORPUS}")
SAMPLES = 4
TEMPERATURES = {"samples": 0.7, "extract": 0.0, "free": 1.0, "night": 0.7}
SEEDS = ROOT / "examples/nightly/seeds.jsonl"

FIRST = ("Anna", "Ben", "Carla", "David", "Elena", "Farid", "Greta", "Hugo", "Iris", "Jonas")
LAST = ("Berger", "Costa", "Duval", "Evans", "Fischer", "Garcia", "Hansen", "Ito", "Jensen")
CITIES = ("Lisbon", "Oslo", "Turin", "Lyon", "Graz", "Leeds", "Porto", "Ghent")
ITEMS = ("desk lamp", "office chair", "coffee grinder", "garden hose", "water bottle", "tea kettle")


def order(generator: random.Random) -> str:
    """A prompt that asks for an order as JSON, with one example."""
    one = generator.choice
    name, city, item = f"{one(FIRST)} {one(LAST)}", one(CITIES), one(ITEMS)
    quantity, price = generator.randint(2, 9), generator.randint(10, 300)
    return (
        "Extract the order as JSON with the keys customer, city, item, quantity, price, "
        "order_number.\n\n"
        "Order: Bob Stone from Paris ordered 2 red pens for 4 dollars. The order number is A-1001."
        '\n{"customer": "Bob Stone", "city": "Paris", "item": "red pens", "quantity": 2, '
        '"price": 4, "order_number": "A-1001"}\n\n'
        f"Order: {name} from {city} ordered {quantity} {item}s for {price} dollars. "
        f"The order number is B-{generator.randint(1000, 9999)}.\n"
    )


def chat(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """A prompt's tokens under the chat template."""
    turn = [{"role": "user", "content": prompt}]
    return tuple(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False))


def seed(i: int) -> str:
    """A prompt of the recipe in examples/nightly: a topic for an audience, of which there are 60.

    Further ones give each topic another audience.
    """
    seeds = [json.loads(line) for line in SEEDS.read_text().splitlines()]
    topic, audience = seeds[i % len(seeds)], seeds[(i + i // len(seeds)) % len(seeds)]
    return f"Explain {topic['topic']} to {audience['audience']}, in two or three sentences."


def night(tokenizer: Any, number: int, rows: int, tokens: int) -> list[Request]:
    """The requests of a night, counted from 0: half of its seeds are of the night before."""
    first = number * (rows - rows // 2)
    sampling = SamplingParams(tokens, TEMPERATURES["night"])
    return [
        Request(str(i), chat(tokenizer, seed(i)), replace(sampling, seed=number * rows + i))
        for i in range(first, first + rows)
    ]


def written(pair: ModelPair, requests: list[Request], batch: int, path: Path) -> Corpus:
    """The corpus of what a night wrote, made as a job makes it."""
    engine = Engine(replace(pair, draft=None), policy=make_policy("none"), slots=batch)
    done, texts = engine.generate(requests), Texts(pair.tokenizer)
    completions = [texts.completion(*each) for each in zip(requests, done, strict=True)]
    tokens = corpus_tokens(pair.tokenizer, completions, [each.finish_reason for each in done])
    mark = tokenizer_mark(pair.tokenizer)
    console.log(f"a corpus of {build_corpus(tokens, path, mark):,} tokens")
    return Corpus(path, mark)


def work_of(kind: str, tokenizer: Any, prompts: Any, rows: int, tokens: int) -> list[Request]:
    """The requests of one kind of work."""
    if kind == "night":
        return night(tokenizer, 1, rows, tokens)
    if kind == "extract":
        generator = random.Random(0)
        texts = [chat(tokenizer, order(generator)) for _ in range(rows)]
    else:
        texts = read_prompts(tokenizer, prompts, rows)
    many = SAMPLES if kind == "samples" else 1
    return [
        Request(str(i), text, SamplingParams(tokens, TEMPERATURES[kind], seed=i))
        for i, text in enumerate(text for text in texts for _ in range(many))
    ]


def doubled(costs: CostModel, n: int) -> float:
    """How much longer a round of 2n tokens takes than one of n."""
    return float(costs.verify(2 * n) / costs.verify(n))


def engine_of(
    side: str, pair: ModelPair, costs: CostModel, corpus: Corpus | None, batch: int
) -> Engine:
    """An engine of a side, which has learnt nothing yet."""
    name = side.removesuffix(WITH_CORPUS)
    drafts = name in WITH_DRAFT
    return Engine(
        pair if drafts else replace(pair, draft=None),
        policy=make_policy("goodput" if drafts else name, costs=copy.deepcopy(costs)),
        verification="coupled",
        slots=batch,
        lookup=name != "draft",
        corpus=corpus if name != side else None,
    )


def compare(
    pair: ModelPair, requests: list[Request], corpus: Corpus | None, batch: int, repeats: int
) -> list[list[str]]:
    """The sides in turns: a line of the table for each."""
    draft = pair.draft
    costs = profile_costs(pair.target, draft, batch)
    sides = WITHOUT_DRAFT if corpus is None else SECOND_NIGHT
    if draft is not None:
        sides = (*sides, *(WITH_DRAFT if corpus is None else WITH_DRAFT_AND_CORPUS))
    Engine(pair, policy=make_policy("none"), slots=batch).generate(requests[:batch])  # warm
    taken: dict[str, list[float]] = {side: [] for side in sides}
    engines: dict[str, Engine] = {}
    for turn in range(repeats):
        engines = {side: engine_of(side, pair, costs, corpus, batch) for side in sides}
        for side, spent in race(engines, requests).items():
            taken[side].append(spent)
        faster = {s: f"{taken['none'][-1] / taken[s][-1]:.2f}" for s in sides}
        console.log(f"{turn + 1}/{repeats}: {faster}")
    lines = []
    for side, engine in engines.items():
        counts, spent = engine.stats.counts, engine.stats.seconds
        learnt = getattr(engine.policy, "costs", None)
        host = spent.get("decide", 0.0) / sum(spent.values())
        lines.append(
            [
                side,
                f"{1 / statistics.median(taken[side]):.0f}",
                spread(ratios(taken["none"], taken[side])),
                f"{counts.verified / counts.committed:.2f}",
                f"{counts.acceptance_rate or 0:.2f}",
                f"{engine.stats.accepted_in_corpus / (counts.accepted or 1):.2f}",
                f"{counts.block_efficiency or 0:.2f}",
                f"{host:.2%}",
                f"{doubled(costs, batch):.2f} {doubled(learnt, batch):.2f}" if learnt else "",
            ]
        )
    return lines


def main(
    target: Target = TARGET,
    precision: Precision = "int8",
    draft: Annotated[str, typer.Option(help="a draft model; none by default")] = "",
    prompts: Prompts = PROMPTS,
    work: Annotated[str, typer.Option(help="kinds, separated by commas")] = "samples,extract,free",
    rows: Rows = 32,
    tokens: Tokens = 160,
    batch: Annotated[int, typer.Option(help="slots")] = 16,
    repeats: Repeats = 3,
    threads: Threads = 0,
) -> None:
    """Race the sides on each kind of work and print a table."""
    prepare(threads)
    pair = load(target, draft or None, precision)
    table = Table(
        title=f"live batch {batch}, {rows} prompts, {precision}, {torch.get_num_threads()} threads"
    )
    for column in ("work", "side", "tokens/s", "against none", "verified a token", "accepted"):
        table.add_column(column, justify="right")
    for column in ("of corpus", "tokens a round", "lookup, decisions", "V(2n) / V(n)"):
        table.add_column(column, justify="right")
    for kind in work.split(","):
        requests = work_of(kind, pair.tokenizer, prompts, rows, tokens)
        with tempfile.TemporaryDirectory() as folder:
            corpus = None
            if kind == "night":
                first = night(pair.tokenizer, 0, rows, tokens)
                corpus = written(pair, first, batch, Path(folder) / "first.corpus")
            for line in compare(pair, requests, corpus, batch, repeats):
                table.add_row(kind, *line)
    console.print(table)


if __name__ == "__main__":
    run(__doc__, main)
