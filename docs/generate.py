"""Writes the pages and schemas of docs/ that come from the code.

    python docs/generate.py

`job-file.md`, `recipe-file.md` and the two JSON Schemas come from the descriptions of keys in
pipeline/config and jobs/nightly, `cli.md` from the help of the commands, `openai-parameters.md`
from what is known of requests, `models.md` from the table of families that benchmarks/families.py
writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer
import yaml
from typer.cli import get_docs_for_click
from typer.core import TyperGroup

from jobs.cli import app
from jobs.schema import job_schema, recipe_schema, schema_text
from pipeline.config.model_family import LAYERS, families
from pipeline.inputs.openai_parameters import Parameters, short
from pipeline.inputs.openai_requests import PARAMETERS

DOCS = Path(__file__).parent
NOTE = "<!-- Written by `python docs/generate.py`, from the code. -->"
"""Stands last: MkDocs takes a page's title from its first line."""

JOB_FILE = """\
# Job file

A job file says which rows to complete, with which models, how, and where the results go.
It is YAML. Three keys are required; all others have defaults.

{example}

`specbatch validate job.yaml` checks a job file, its models, input and output, and prints it with
its defaults filled in. A wrong key or value is refused in one line, with the key and the fix.

- **Paths** are relative to the job file's folder, and those of `--set` to the folder you are in.
  `file:///PATH` is a path, too, in which `%20` is a space; `s3a://` and `s3n://` are `s3://`. A key
  on S3 is taken as it stands: `%20` is `%20`, and `a//b` is not `a/b`.
- **Two stores.** `input.s3` and `output_s3` are `s3` for one side, each with what it leaves out
  taken from `s3`: a public input is `input.s3: {{anonymous: true}}`, and your own output
  `output_s3: {{endpoint: ...}}`. An `endpoint` in `s3` is for both.
- **Overrides.** `--set speculation.policy=none` replaces any key for one run; its value is YAML.
- **A row's own sampling.** A column `sampling_params` (a struct or JSON) overrides `sampling` for
  its row, by the same names.
- **The model's own sampling.** A job that names no `sampling.temperature` takes what the target's
  `generation_config.json` recommends. `validate`, `plan` and the report say which values are in
  force, and where each is from: the job, the model, or neither.
- **In your editor.** This first line makes editors complete and check keys, with the file that
  `specbatch schema > job.schema.json` writes: `# yaml-language-server: $schema=job.schema.json`
"""

RECIPE_FILE = """\
# Recipe file

A recipe says how a dataset is made [every night](nightly.md): from which seeds, through which
templates, with which job, and what is kept. It is YAML.

{example}

Paths are relative to the recipe's folder, and those of `--set` to the folder you are in.
`--set seeds.per_night=20` replaces any key for one run.
Editors complete and check keys by `specbatch schema --nightly`, as for [job files](job-file.md).
"""

CLI = """\
# Commands

`specbatch COMMAND --help` prints the same in the terminal.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed, or `verify` found something |
| 2 | a mistake in what was asked |
| 3 | stopped at the [budget](job-file.md#budget) |
| 4 | [too many rows](operations/failures.md#too-many-errors) are in errors |
| 130 | stopped by Ctrl-C or SIGTERM |
"""

MODELS = """\
# Models

Which causal architectures of transformers run, as `benchmarks/families.py` found with tiny random
weights, in float32 and bfloat16. Rows of different lengths, beyond windows and blocks and rolled
back, are compared with transformers' own forward. Windows, soft caps, scales and shared keys are
tried where a config has them.

A model is compared with its own plain forward whenever it is loaded. So one that is not here, or
other than its family, runs right or is refused with the reason. `specbatch validate` tells the
family of a model from its config, before it is loaded.

The comparison reads texts of 73 and 22 tokens on a CPU, 401 and 130 on a GPU. Meanwhile windows are
8 tokens. Where a CPU has no instructions for half precision, linear layers multiply in `float32`
for that long, and round what comes out.

- **Attention of their own.** BLOOM, Falcon, MPT, GPT-J and others compute their softmax themselves,
  not by transformers' `AttentionInterface`. They run by an adapter, their layers as they are.
- **Rotary embeddings of kind `longrope`.** Beyond the context that a model was first trained for,
  all tokens of a row have other angles, and a row that grows past it is computed anew. So rows end
  there: Phi-4-mini has 4,096 positions here, not 131,072. A warning says so when such a model is
  loaded.
- **BLOOM.** Its config need not say how many positions it has. It has the 2,048 of its training.
- **Layers that run more than once** in a forward (HRM-Text) have keys of their own each time, for
  which there is no place here: such models are refused.
- **Padding in a text.** RoBERTa and its kin do not count padding tokens as they number positions.
  Here each token of a row counts.

## Weights that are stored quantised

transformers loads them, by the package of their makers where it needs one. Each is an extra:
`pip install 'specbatch[gptq]'`. A package that is missing is named before anything is loaded.

| checkpoint | extra | on a CPU, as tests of tiny models run it | `deterministic`, int8 |
|---|---|---|---|
| FP8, by block or tensor | `fp8`, on GPUs | expanded as they are loaded | yes |
| MXFP4 (gpt-oss) | `mxfp4`, on GPUs | expanded as they are loaded | int8 alone |
| W4A16 of compressed-tensors | `compressed-tensors` | expanded as they are loaded | yes |
| W8A8 and FP8 of the same | `compressed-tensors` | expanded, activations rounded | refused |
| bitsandbytes, 8 bits and NF4 | `bitsandbytes` | stay quantised | refused |
| torchao, int8 with and without activations | `torchao` | stay quantised | refused |
| GPTQ, 4 bits | `gptq` | stay quantised | refused |
| AWQ, 4 bits | `awq` | stay quantised | refused |

- **Expanded weights** are plain layers: packed, fused, and made int8 or deterministic as others
  are. They take the memory of `dtype`, not of the checkpoint.
- **Layers that stay quantised** run as their package runs them, and nothing here replaces them. The
  output is that of transformers with the same layers.
- **`dtype: auto`** is what the checkpoint's config says, `bfloat16` if it says nothing of half
  precision; on a CPU `float32` where that is faster. On GPUs, FP8, GPTQ and AWQ refuse `float32`.
- **GPUs.** None of these was run on one yet. Without the package `kernels` transformers expands
  MXFP4, and refuses FP8.
- **GPTQ and AWQ.** `gptqmodel` is built from source, for which torch and `pypcre` must be installed
  before: `pip install --no-build-isolation 'specbatch[gptq]'`. Version 7.7 asks for torch 2.14.1;
  the tests ran it with torch 2.13.

## Families

| layers | what runs |
|---|---|
{layers}

{runs} of {all} families run:

| family | runs | layers | why not |
|---|---|---|---|
{families}
"""

OPENAI = """\
# Parameters of OpenAI requests

What becomes of each parameter of OpenAI's API and of vLLM's requests in a line of a
[batch file](openai-batch.md).

- **served**: what it asks for is done. A value that is none of its own is that line's error.
- **ignored**: it has no influence on what is generated here, whatever its value.
- **refused**: it is not supported. Only the values that stand there are taken, since they ask for
  nothing; so is `null`. Any other is the line's error, `UnsupportedParameter`, which names it.
- **unknown**: the endpoint has no such parameter. It is the line's error, too.

| parameter | {endpoints} |
|---|---|---|---|
{rows}
"""

OF_JOB_FILES = {
    "JobConfig": "job-file.md",
    "ModelsConfig": "job-file.md#models",
    "SamplingConfig": "job-file.md#sampling",
    "StructuredOutputs": "job-file.md#samplingstructured_outputs",
    "SpeculationConfig": "job-file.md#speculation",
    "ActorsConfig": "job-file.md#actors",
}
"""Sections of recipes that the page of job files describes."""

Schema = Mapping[str, Any]

_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def pages() -> dict[str, str]:
    """Each generated file's text, by its name in docs/."""
    job, recipe = job_schema(), recipe_schema()
    return {
        "job-file.md": Reference(job, {}).page(JOB_FILE),
        "recipe-file.md": Reference(recipe, OF_JOB_FILES).page(RECIPE_FILE),
        "cli.md": cli_page(),
        "openai-parameters.md": openai_page(),
        "models.md": models_page(),
        "job.schema.json": schema_text(job),
        "recipe.schema.json": schema_text(recipe),
    }


class Reference:
    """A JSON Schema as a page: a table of the file's keys, then one for each section.

    Args:
        schema: of the file.
        elsewhere: links to what is described on other pages, by its name in the schema.
    """

    def __init__(self, schema: Schema, elsewhere: Mapping[str, str]) -> None:
        self._schema = schema
        self._links = dict(elsewhere)
        self._sections: dict[str, Schema] = {}
        """By their dotted paths, in the order of the page."""
        self._find_sections(schema, "")

    def _find_sections(self, section: Schema, prefix: str) -> None:
        found: dict[str, Schema] = {}
        for key, value in section["properties"].items():
            for name in _references(value):
                if name not in self._links:
                    path = prefix + key
                    self._links[name] = f"#{path.replace('.', '')}"
                    found[path] = self._schema["$defs"][name]
        # Only now what they hold: a section that is in another one, too, is described here.
        for path, inner in found.items():
            self._sections[path] = inner
            self._find_sections(inner, f"{path}.")

    def page(self, introduction: str) -> str:
        """The page as Markdown."""
        [whole] = self._schema["examples"]
        parts = [introduction.format(example=_fenced(whole)), self._table(self._schema)]
        for path, section in self._sections.items():
            parts += [f"{'#' * (2 + path.count('.'))} `{path}`", section["description"]]
            parts += [self._example(path, each) for each in section.get("examples", ())]
            parts.append(self._table(section))
        return _joined(parts)

    def _example(self, key: str, example: Any) -> str:
        """An example of a section at its place in the file."""
        outer, *inner = key.split(".")
        for name in reversed(inner):
            example = {name: example}
        a_list = self._schema["properties"][outer].get("type") == "array"
        return _fenced({outer: [example] if a_list else example})

    def _table(self, section: Schema) -> str:
        lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, value in section["properties"].items():
            default = "required" if key in section.get("required", ()) else _default(value)
            lines.append(f"| `{key}` | {self._type(value)} | {default} | {self._meaning(value)} |")
        return "\n".join(lines)

    def _meaning(self, value: Schema) -> str:
        if "description" in value:
            return str(value["description"])
        # Pydantic leaves it out where the section itself is described in the same words.
        [section] = _references(value)
        return str(self._schema["$defs"][section]["description"])

    def _type(self, value: Schema) -> str:
        match value:
            case {"$ref": reference}:
                return f"[section]({self._links[_name(reference)]})"
            case {"anyOf": choices}:
                return " or ".join(map(self._type, choices))
            case {"enum": values}:
                return ", ".join(f"`{each}`" for each in values)
            case {"const": only}:
                return f"`{only}`"
            case {"items": items}:
                return f"list of {self._type(items)}"
            case {"additionalProperties": bool()}:
                return "map of names to any value"
            case {"additionalProperties": inner}:
                return f"map of names to {self._type(inner)}"
            case {"patternProperties": patterns}:
                [inner] = patterns.values()
                return f"map of names to {self._type(inner)}"
            case {"type": "null"}:
                return "`null`"
        bounds = [f"{sign} {value[word]:g}" for word, sign in _BOUNDS.items() if word in value]
        return ", ".join([value["type"], *bounds])


def _references(value: Schema) -> Iterator[str]:
    """Names of the sections that a key's value may be, or may hold."""
    if "$ref" in value:
        yield _name(value["$ref"])
    inner = [*value.get("anyOf", ()), *value.get("patternProperties", {}).values()]
    inner += [value[w] for w in ("items", "additionalProperties") if isinstance(value.get(w), dict)]
    for each in inner:
        yield from _references(each)


def _name(reference: str) -> str:
    return reference.rpartition("/")[2]


def _default(value: Schema) -> str:
    if "default" in value:
        # The first line: after a lone word, YAML ends the document in a second one.
        return f"`{yaml.safe_dump(value['default'], default_flow_style=True).splitlines()[0]}`"
    return "none" if value.get("type") == "object" else "its defaults"


def _fenced(example: Any) -> str:
    text = yaml.safe_dump(example, sort_keys=False, default_flow_style=None, width=100)
    return f"```yaml\n{text}```"


def _joined(parts: list[str]) -> str:
    return "\n\n".join(part.strip() for part in [*parts, NOTE]) + "\n"


def cli_page() -> str:
    """The commands, in the groups of `specbatch --help`."""
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    context = typer.Context(root, info_name="specbatch")
    parts, group = [CLI], None
    for command in root.commands.values():
        if command.rich_help_panel != group:
            group = command.rich_help_panel
            parts.append(f"## {group}")
        page = get_docs_for_click(obj=command, ctx=context, indent=2, call_prefix="specbatch")
        # Lists of sub-commands cut their help short; it follows whole, right below.
        parts.append(re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", page))
    return _joined(parts)


def openai_page() -> str:
    """What becomes of each parameter, by endpoint."""
    names = {
        name
        for known in PARAMETERS.values()
        for name in (*known.served, *known.ignored, *known.neutral)
    }
    rows = (
        f"| `{name}` | {' | '.join(_fate(known, name) for known in PARAMETERS.values())} |"
        for name in sorted(names)
    )
    endpoints = " | ".join(f"`{url}`" for url in PARAMETERS)
    return _joined([OPENAI.format(endpoints=endpoints, rows="\n".join(rows))])


def _fate(known: Parameters, name: str) -> str:
    if name in known.served:
        return "served"
    if name in known.ignored:
        return "ignored"
    if name not in known.neutral:
        return "unknown"
    fine = " or ".join(f"`{short(value)}`" for value in known.neutral[name])
    return f"refused, but {fine}" if fine else "refused"


def models_page() -> str:
    """The table of families, those that run first."""
    table = sorted(families().items(), key=lambda item: (not item[1].runs, item[0]))
    rows = [
        f"| `{kind}` | {family.verdict} | {family.layers or ''} | {family.why} |"
        for kind, family in table
    ]
    return _joined(
        [
            MODELS.format(
                layers="\n".join(f"| `{name}` | {what} |" for name, what in LAYERS.items()),
                runs=sum(family.runs for _, family in table),
                all=len(table),
                families="\n".join(rows),
            )
        ]
    )


def main() -> None:
    """Write all files."""
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
