"""JSON Schemas of many kinds: whether outputs validate, and what speculation gains on such jobs.

    python benchmarks/schemas.py --schemas 200 --batches 1,16

Each row asks for JSON of a schema of its own: nested objects, arrays with bounds, enums, oneOf,
patterns, numbers with bounds, $ref, formats and constants, in variants. All rows are decoded with
and without speculation, in turns in one run. Every output that ended with `stop` is checked by the
library jsonschema; the program fails if one is not valid. An output may also be cut off at
`--tokens`.

Prints for each live batch the outputs that ended and how many of them validate, tokens per second
of each policy and the ratio to `none`. `one` is the share of output tokens that the schema alone
determined: behind the tokens before them nothing else was allowed. `forced` is the share of output
tokens that were accepted as tokens of the only text that could follow, and how many of those that
were proposed stood. `suffix` runs without the draft. Some 20 minutes on two cores with the
defaults.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator, Sequence
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
    Target,
    Threads,
    Tokens,
    console,
    load,
    prepare,
    run,
)
from rich.table import Table

from pipeline.config.structured_outputs import StructuredOutputs
from pipeline.texts import Texts
from specdec.engine.engine import Engine
from specdec.loading.grammars import ModelGrammars
from specdec.loading.pair import ModelPair
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


def main(
    target: Target = TARGET,
    draft: Draft = DRAFT,
    precision: Precision = "int8",
    schemas_: Annotated[int, typer.Option("--schemas", help="how many schemas")] = 200,
    tokens: Tokens = 128,
    batches: Batches = "1,16",
    policies: Annotated[
        str, typer.Option(help="separated by commas")
    ] = "none,suffix,fixed,goodput",
    threads: Threads = 0,
) -> None:
    """Decode all schemas by each policy at each live batch, and check what comes out."""
    prepare(threads)
    pair = load(target, draft, precision)
    texts = Texts(pair.tokenizer)
    grammars = ModelGrammars(pair.tokenizer, pair.vocab_size, pair.eos_token_ids)
    asked = list(itertools.islice(schemas(), schemas_))
    requests = requests_of(pair, asked, tokens)
    shown = Table(title=f"{len(asked)} schemas, {precision}, at most {tokens} tokens")
    for column in ("live", "policy", "ended", "valid", "one", "forced", "tokens/s", "against none"):
        shown.add_column(column, justify="right")
    wrong: list[str] = []
    for live in map(int, batches.split(",")):
        plain = 0.0
        for name in policies.split(","):
            engine = Engine(pair, policy=make_policy(name), slots=live, grammars=grammars)
            began = time.perf_counter()
            done = engine.generate(requests)
            rate = sum(len(each.output_ids) for each in done) / (time.perf_counter() - began)
            plain = plain or rate
            stats = engine.stats
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
                f"{rate:.1f}", f"{rate / plain:.2f}",
            )  # fmt: skip
            console.log(f"live {live}, {name}: {rate:.1f} tokens/s")
    console.print(shown)
    for fault in wrong[:20]:
        console.print(fault, markup=False)
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    run(__doc__, main)
