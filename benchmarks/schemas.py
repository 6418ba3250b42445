"""JSON Schemas of many kinds: whether outputs validate, and what speculation gains on such jobs.

    python benchmarks/schemas.py --schemas 200 --batches 1,16

Each row asks for JSON of a schema of its own: nested objects, arrays with bounds, enums, oneOf,
patterns, numbers with bounds, $ref, formats and constants, in variants. All rows are decoded with
and without speculation, `--repeats` times in turns. Verification is `coupled`, so that all sides
have the same tokens to generate. Every output that ended with `stop` is checked by the library
jsonschema; the program fails if one is not valid. An output may also be cut off at `--tokens`.

Sides are policies without a draft model; `goodput+draft` is one with it.

Prints for each live batch the outputs that ended and how many of them validate, tokens per second
of each side and how many times faster than `none` it is (the median of the paired ratios, with the
smallest and largest). `one` is the share of output tokens that the schema alone determined: behind
the tokens before them nothing else was allowed. `forced` is the share of output tokens that were
accepted as tokens of the only text that could follow, and how many of those that were proposed
stood. Some 20 minutes on two cores with the defaults.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any

import jsonschema
import numpy as np
import typer
from common import (
    DRAFT,
    TARGET,
    Batches,
    Draft,
    Precision,
    Repeats,
    Target,
    Threads,
    Tokens,
    console,
    load,
    prepare,
    ratios,
    run,
    spread,
)
from rich.table import Table

from pipeline.config.structured_outputs import StructuredOutputs
from pipeline.texts import Texts
from specdec.engine.engine import Engine
from specdec.loading.grammars import ModelGrammars
from specdec.loading.pair import ModelPair
from specdec.policies.costs import CostModel
from specdec.policies.profiling import profile_costs
from specdec.policies.registry import make_policy
from specdec.request import Completion, Request, SamplingParams

Schema = dict[str, Any]
WORDS = ("name", "city", "age", "price", "tags", "kind", "owner", "date", "score", "note")


def obj(properties: Schema, optional: Sequence[str] = ()) -> Schema:
    """An object with these properties and no others."""
    required = [key for key in properties if key not in optional]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def values(i: int) -> list[Schema]:
    """What a property may be, in the i-th variant."""
    text: Schema = {"type": "string", "maxLength": 12 + i % 9}
    return [
        text,
        {"type": "integer", "minimum": -i, "maximum": 10 * i + 9},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 100 + i},
        {"type": "boolean"},
        {"enum": ["red", "green", i, None, f"kind-{i}"]},
        {"const": f"v{i}"},
        {"type": "array", "items": {"type": "integer"}, "minItems": i % 3, "maxItems": i % 3 + 2},
        {"type": "array", "items": text, "minItems": 1, "maxItems": 2},
        {"type": "string", "pattern": f"^[A-Z]{{2}}-[0-9]{{{1 + i % 4}}}$"},
        {"type": "string", "format": ("date", "time", "uuid", "ipv4")[i % 4]},
        {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "null"}]},
        {"anyOf": [text, {"type": "boolean"}]},
        obj({"x": {"type": "integer"}, "y": {"type": "integer"}}),
        obj({"inner": obj({"deep": obj({"flag": {"type": "boolean"}})})}),
        {"$ref": "#/$defs/point"},
        {"type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1, "maxItems": 2},
        {"type": ["string", "null"], "maxLength": 8},
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}],
         "items": False, "minItems": 2},
    ]  # fmt: skip


def schemas() -> Iterator[Schema]:
    """Schemas without end: each property is of every kind in turn, two to five in an object."""
    point = obj({"lat": {"type": "number"}, "lon": {"type": "number"}}, optional=("lon",))
    for i in itertools.count():
        kinds = values(i)
        names = [WORDS[(i + j) % len(WORDS)] for j in range(2 + i % 4)]
        properties = {name: kinds[(i + 5 * j) % len(kinds)] for j, name in enumerate(names)}
        optional = names[-1:] if i % 5 == 4 else ()
        yield {**obj(properties, optional), "$defs": {"point": point}}


def forced_share(
    grammars: ModelGrammars, requests: Sequence[Request], done: Sequence[Completion]
) -> float:
    """The share of output tokens behind which the mask allowed no other."""
    forced = total = 0
    for request, completion in zip(requests, done, strict=True):
        matcher: Any = grammars.matcher(request.sampling.grammar or "")
        words = np.zeros((1, -(-grammars.size // 32)), dtype=np.int32)
        for token in completion.output_ids:
            grammars.fill([matcher], words)
            forced += int(np.bitwise_count(words.view(np.uint32)).sum()) == 1
            total += 1
            matcher.try_consume_tokens([token])
    return forced / total


def invalid(texts: Texts, asked: Schema, request: Request, done: Completion) -> str | None:
    """What is wrong with an output that ended by itself."""
    try:
        jsonschema.validate(json.loads(texts.completion(request, done)), asked)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{request.id}: {error}"
    return None


def requests_of(pair: ModelPair, asked: Sequence[Schema], tokens: int) -> list[Request]:
    """A prompt for each schema, which says what is wanted."""
    made = []
    for i, schema in enumerate(asked):
        keys = ", ".join(schema["properties"])
        chat = [{"role": "user", "content": f"Write a JSON object with {keys}. Item {i}."}]
        ids = pair.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=False
        )
        grammar = StructuredOutputs(json_schema=schema).text()
        sampling = SamplingParams(tokens, temperature=0.7, top_p=0.95, seed=i, grammar=grammar)
        made.append(Request(str(i), tuple(ids), sampling))
    return made


def side_engine(
    pair: ModelPair, side: str, live: int, grammars: ModelGrammars, costs: CostModel
) -> Engine:
    """An engine for a side's name: a policy, with "+draft" behind it where it may draft."""
    name, _, draft = side.partition("+")
    return Engine(
        pair if draft else replace(pair, draft=None),
        policy=make_policy(name, costs=copy.deepcopy(costs)),
        verification="coupled",
        slots=live,
        grammars=grammars,
    )


def main(
    target: Target = TARGET,
    draft: Draft = DRAFT,
    precision: Precision = "int8",
    schemas_: Annotated[int, typer.Option("--schemas", help="how many schemas")] = 200,
    tokens: Tokens = 128,
    batches: Batches = "1,16",
    sides: Annotated[
        str, typer.Option(help="separated by commas; the first one is compared with")
    ] = "none,suffix,goodput,goodput+draft",
    repeats: Repeats = 2,
    threads: Threads = 0,
) -> None:
    """Decode all schemas by each side at each live batch, and check what comes out."""
    prepare(threads)
    pair = load(target, draft, precision)
    texts = Texts(pair.tokenizer)
    grammars = ModelGrammars(pair.tokenizer, pair.vocab_size, pair.eos_token_ids)
    asked = list(itertools.islice(schemas(), schemas_))
    requests = requests_of(pair, asked, tokens)
    shown = Table(title=f"{len(asked)} schemas, {precision}, at most {tokens} tokens")
    for column in ("live", "side", "ended", "valid", "one", "forced", "tokens/s", "against none"):
        shown.add_column(column, justify="right")
    wrong: list[str] = []
    names = sides.split(",")
    for live in map(int, batches.split(",")):
        costs = profile_costs(pair.target, pair.draft, live)
        taken: dict[str, list[float]] = {name: [] for name in names}
        side_engine(pair, names[0], live, grammars, costs).generate(requests[:live])  # warm
        for turn, name in itertools.product(range(repeats), names):
            engine = side_engine(pair, name, live, grammars, costs)
            began = time.perf_counter()
            done = engine.generate(requests)
            spent = time.perf_counter() - began
            stats = engine.stats
            taken[name].append(spent / stats.counts.committed)
            console.log(f"{turn + 1}/{repeats} live {live}, {name}: {spent:.1f} s")
            if turn + 1 < repeats:
                continue
            stood = stats.accepted_forced / max(stats.verified_forced, 1)
            ended = [i for i, each in enumerate(done) if each.finish_reason == "stop"]
            faults = [invalid(texts, asked[i], requests[i], done[i]) for i in ended]
            faults += [each.error for each in done if each.error]
            found = [fault for fault in faults if fault]
            wrong += found
            shown.add_row(
                str(live), name, str(len(ended)), str(len(ended) - len(found)),
                f"{forced_share(grammars, requests, done):.2f}",
                f"{stats.accepted_forced / stats.counts.committed:.2f}, {stood:.0%}",
                f"{1 / statistics.median(taken[name]):.1f}",
                spread(ratios(taken[names[0]], taken[name])),
            )  # fmt: skip
    console.print(shown)
    for fault in wrong[:20]:
        console.print(fault, markup=False)
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    run(__doc__, main)
