"""The dataset card: README.md, from the manifests of all published nights alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from jobs.nightly.archive import Night
from jobs.nightly.filters import ORDER
from jobs.nightly.publish import SPLITS, published_files
from jobs.nightly.recipe import Recipe
from jobs.terminal.amounts import money

_SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
"""Rows at which the hub's size categories begin."""

_EXAMPLE_CHARS = 1200
"""Characters of a message that the card shows; longer ones are cut."""

_MEANING = {
    "finish reason": "did not end in one of the kept ways, such as cut at `max_new_tokens`",
    "length": "shorter or longer than allowed",
    "n-grams": "repeats itself: share of n-grams that occurred before",
    "compression": "repeats itself: compresses too well",
    "regex": "lacks a required pattern, or has a forbidden one",
    "language": "in another language, or in none that is recognised",
    "refusal": "the model declines",
    "schema": "a structured turn is not what it must be, or no column can hold it",
    "judge": "the judge's score is below the threshold",
    "exact duplicate": "the same conversation was kept before, in this night or another",
    "near duplicate": "nearly the same completion was kept before, in this night or another",
    "select": "other samples of its prompt are better",
}


def card(recipe: Recipe, nights: Sequence[Night]) -> str:
    """The whole card.

    Args:
        recipe: the recipe as it is now.
        nights: all that is published, in the order of dates.
    """
    head = yaml.safe_dump(_front(recipe, nights), sort_keys=False, allow_unicode=True, width=10_000)
    parts = [f"---\n{head}---", f"# {recipe.name}", recipe.description.strip()]
    parts += [_about(recipe, nights), *_sections(recipe, nights)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(recipe: Recipe, nights: Sequence[Night]) -> dict[str, Any]:
    files = [
        {"split": split, "path": paths}
        for split in SPLITS
        if (paths := list(published_files(nights, split)))
    ]
    front: dict[str, Any] = {"pretty_name": recipe.name}
    if "dataset" in recipe.licences:
        front["license"] = recipe.licences["dataset"]
    if recipe.filters.language is not None:
        front["language"] = list(recipe.filters.language.allow)
    front |= {
        "tags": ["synthetic", "specbatch"],
        "task_categories": ["text-generation"],
        "size_categories": [_size(sum(night.total_rows for night in nights))],
    }
    if files:
        front["configs"] = [{"config_name": "default", "data_files": files}]
    return front


def _size(rows: int) -> str:
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B"]
    return names[sum(rows >= size for size in _SIZES)]


def _about(recipe: Recipe, nights: Sequence[Night]) -> str:
    rows = sum(night.total_rows for night in nights)
    if not nights:
        return "No night is published yet."
    span = nights[0].date if len(nights) == 1 else f"{nights[0].date} to {nights[-1].date}"
    return (
        f"Synthetic conversations: {rows:,} rows of {len(nights)} "
        f"night{'s' if len(nights) > 1 else ''} ({span}), made by `specbatch nightly`. The front "
        "matter lists the files of complete nights; `datasets.load_dataset` reads these."
    )


def _sections(recipe: Recipe, nights: Sequence[Night]) -> Iterator[str]:
    if not nights:
        return
    yield "## Nights\n\n" + nights_table(nights)
    yield "## What the filters did\n\n" + filters_table(nights)
    yield "## How it was made\n\n" + _making(recipe, nights[-1])
    yield "## Columns\n\n" + _columns(recipe, nights[-1])
    examples = [example for night in reversed(nights) for example in night.examples][:2]
    if examples:
        shown = "\n\n".join(_fenced(_conversation(example)) for example in examples)
        yield f"## Examples\n\n{shown}"


# ------------------------------------------------------------------------ tables


def nights_table(nights: Sequence[Night]) -> str:
    """Rows, tokens, cost and speedup of each night, and of all."""
    rows = [
        (
            night.date,
            f"{night.seeds:,}",
            f"{night.conversations:,}",
            *(f"{night.rows.get(split, 0):,}" for split in SPLITS),
            f"{night.summary['output_tokens']:,}",
            money(night.cost, night.currency),
            money(night.per_million, night.currency),
            speedup(night.summary),
        )
        for night in nights
    ]
    if len(nights) > 1:
        rows.append(_total(nights))
    names = ("night", "seeds", "conversations", *SPLITS, "output tokens", "cost")
    return table((*names, "per million tokens", "speedup"), rows)


def _total(nights: Sequence[Night]) -> tuple[str, ...]:
    tokens = sum(night.summary["output_tokens"] for night in nights)
    costs = [night.cost for night in nights if night.cost is not None]
    # Without a price of every night there is none of all.
    cost = sum(costs) if len(costs) == len(nights) else None
    currency = nights[-1].currency
    return (
        "all",
        f"{sum(night.seeds for night in nights):,}",
        f"{sum(night.conversations for night in nights):,}",
        *(f"{sum(night.rows.get(split, 0) for night in nights):,}" for split in SPLITS),
        f"{tokens:,}",
        money(cost, currency),
        money(cost / tokens * 1e6 if cost is not None and tokens else None, currency),
        "",
    )


def filters_table(nights: Sequence[Night]) -> str:
    """How many conversations each filter removed, and how many it would have alone."""
    begun = sum(night.conversations for night in nights)
    lost, removed, matched = Counter[str](), Counter[str](), Counter[str]()
    for night in nights:
        lost.update(night.lost)
        for each in night.filters:
            removed[each["name"]] += each["removed"]
            matched[each["name"]] += each["matched"]
    rows = [("begun", "", "", f"{begun:,}", "")]
    left = begun
    for name, count in lost.most_common():
        left -= count
        rows.append((f"not completed: {name}", f"{count:,}", "", f"{left:,}", ""))
    for name in (name for name in ORDER if name in matched or name in removed):
        left -= removed[name]
        counts = (f"{removed[name]:,}", f"{matched[name]:,}", f"{left:,}")
        rows.append((name, *counts, _MEANING[name]))
    return table(("", "removed", "alone", "left", "what it removes"), rows) + (
        "\n\nEach conversation is counted once, for the first filter that stops it; *alone* counts "
        "the completions that a filter would stop by itself."
    )


def _making(recipe: Recipe, night: Night) -> str:
    licences = recipe.licences
    models = night.models
    lines = [
        f"- Target: `{models['target']}`{_licence(licences, 'target')}. Its output distribution is "
        "that of the target alone: speculative decoding is lossless.",
        f"- Draft: `{models['draft'] or 'none'}`{_licence(licences, 'draft')}, policy "
        f"`{models['policy']}`"
        + (f", acceptance head `{models['head']}`" if models.get("head") else ""),
        "- Sampling: " + ", ".join(f"{k} {v}" for k, v in night.sampling.items() if v != []),
        f"- Seeds: {', '.join(f'`{_public(path)}`' for path in recipe.seeds.paths)}"
        + _licence(licences, "seeds"),
    ]
    for template in recipe.templates:
        texts = [] if template.system is None else [f"system: {template.system}"]
        for number, turn in enumerate(template.turns, start=1):
            asked = recipe.asked(template.name, number)
            kind = f" ({asked.kind})" if asked is not None else ""
            texts.append(f"turn {number}{kind}: {turn.text}")
        lines.append(f"- Template `{template.name}`:\n\n" + _fenced("\n".join(texts), indent=2))
    lines += _choosing(recipe, night)
    lines.append(f"- Split: a hash of the seed, {recipe.split.validation:.0%} for validation")
    return "\n".join(lines)


def _choosing(recipe: Recipe, night: Night) -> Iterator[str]:
    """How conversations were scored and selected."""
    if recipe.judge is not None:
        target = night.judge.get("target", "none yet")
        least = recipe.judge.threshold
        kept = "" if least is None else f"; conversations with {least:g} and more are kept"
        texts = [] if recipe.judge.system is None else [f"system: {recipe.judge.system}"]
        rubric = _fenced("\n".join([*texts, recipe.judge.rubric]), indent=2)
        yield f"- Judge: `{target}`, score `{recipe.judge.score}`{kept}:\n\n{rubric}"
    if recipe.select is not None:
        samples, best = night.sampling.get("n"), recipe.select
        yield f"- Of {samples} samples of a prompt, the best {best.keep} by `{best.by}` are kept"


def _public(path: str) -> str:
    """A path without the folders of the machine that it is on."""
    return path if "://" in path else path.rpartition("/")[2]


def _licence(licences: Mapping[str, str], what: str) -> str:
    return f" (licence: {licences[what]})" if what in licences else ""


def _columns(recipe: Recipe, night: Night) -> str:
    about = {
        **dict.fromkeys(recipe.fields(), "of a structured turn"),
        "logprob": "mean log-probability of the output tokens",
        "score": "the judge's",
        "judgement": "what the judge answered",
        "id": "night, seed, template and sample; unique over all nights",
        "night": "the date",
        "messages": "the conversation: a list of role and content",
        "output_tokens": "what the target wrote, over all its turns",
    }
    rows = [(f"`{name}`", kind, about.get(name, "")) for name, kind in night.columns.items()]
    return table(("column", "type", ""), rows)


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [names, ["---"] * len(names), *rows]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def speedup(summary: Mapping[str, Any]) -> str:
    """The measured speedup with its interval, or a dash."""
    if summary.get("speedup") is None:
        return "–"
    low, high = summary["speedup_ci"]
    return f"{summary['speedup']:.2f}x ({low:.2f}–{high:.2f})"


def _conversation(example: Mapping[str, Any]) -> str:
    text = "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in example["messages"])
    return text if len(text) <= _EXAMPLE_CHARS else f"{text[:_EXAMPLE_CHARS]} …"


def _fenced(text: str, indent: int = 0) -> str:
    """Text that shows as it is, whatever it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " * indent
    return "\n".join(space + line for line in (fence, *text.splitlines(), fence))
