"""How well near-duplicate removal finds planted near duplicates, and what it takes by mistake.

    python benchmarks/duplicates.py texts.parquet --column completion

Of each of some real texts a changed copy is planted; then all texts and copies go through
`jobs.nightly.duplicates.DuplicateIndex` in random order. A copy (or its original, whichever comes
second) that is removed is found. What is removed although nothing like it was planted is a false
alarm, as far as the texts themselves have no near duplicates: those that they have by an exact
comparison of their n-grams are taken out first.

Kinds of copies: words exchanged (1, 3, 10, 20%), one sentence gone, sentences in another order,
case and punctuation changed, a greeting before and a question after, and paraphrases by synonyms,
connectives and other beginnings. With --paraphrases, a column to group by, also those of a model:
several samples of one prompt, which say the same in other words. Word n-grams are not made to find
paraphrases; the figures say what to expect.

Prints a line of JSON for each length of n-grams and each threshold: share found by kind of copy,
precision, milliseconds a text. 1,000 texts take a minute a line on one core.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs.nightly.duplicates import DuplicateIndex, shingles
from jobs.nightly.filter_settings import DuplicatesFilter
from jobs.nightly.filters import words

Change = Callable[[str, list[str], random.Random], str]


def exchanged(share: float) -> Change:
    def change(text: str, others: list[str], chance: random.Random) -> str:
        parts = text.split(" ")
        count = max(1, round(share * len(parts)))
        for at in chance.sample(range(len(parts)), min(count, len(parts))):
            parts[at] = chance.choice(others)
        return " ".join(parts)

    return change


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text.strip())


def without_a_sentence(text: str, others: list[str], chance: random.Random) -> str:
    parts = sentences(text)
    del parts[chance.randrange(len(parts))]
    return " ".join(parts)


def reordered(text: str, others: list[str], chance: random.Random) -> str:
    parts = sentences(text)
    chance.shuffle(parts)
    return " ".join(parts)


def restyled(text: str, others: list[str], chance: random.Random) -> str:
    return re.sub(r"[,;:]", "", text).upper().replace(". ", "!\n\n")


def framed(text: str, others: list[str], chance: random.Random) -> str:
    return f"Sure! Here is the answer.\n\n{text}\n\nIs there anything else I can help with?"


SYNONYMS = {
    "each": "every",
    "total": "overall",
    "so": "therefore",
    "then": "after that",
    "also": "as well",
    "needs": "requires",
    "buys": "purchases",
    "bought": "purchased",
    "gets": "receives",
    "more": "additional",
    "has": "owns",
    "had": "owned",
    "there are": "we have",
    "because": "since",
    "makes": "earns",
    "spent": "paid",
    "costs": "is priced at",
    "altogether": "in all",
    "left": "remaining",
    "children": "kids",
    "half": "50%",
    "twice": "two times",
    "in the": "within the",
    "for the": "on the",
    "number": "count",
    "if": "given that",
}


def paraphrased(text: str, others: list[str], chance: random.Random) -> str:
    """Each of many words by another that means the same; half of the sentences begin otherwise."""
    for word, other in SYNONYMS.items():
        text = re.sub(rf"\b{word}\b", other, text, flags=re.IGNORECASE)
    begin = ("Now ", "Here, ", "We see that ", "Next, ")
    parts = sentences(text)
    return " ".join(chance.choice(begin) + p if chance.random() < 0.5 else p for p in parts)


CHANGES: dict[str, Change] = {
    "1% of words exchanged": exchanged(0.01),
    "3% of words exchanged": exchanged(0.03),
    "10% of words exchanged": exchanged(0.10),
    "20% of words exchanged": exchanged(0.20),
    "one sentence gone": without_a_sentence,
    "sentences reordered": reordered,
    "case and punctuation": restyled,
    "greeting and question around": framed,
    "paraphrased by rules": paraphrased,
}


def jaccard(a: str, b: str, n: int) -> float:
    first, second = shingles(a, n), shingles(b, n)
    return len(first & second) / len(first | second) if first | second else 0.0


def apart(texts: list[str], config: DuplicatesFilter) -> list[str]:
    """Texts of which no two are near duplicates by their n-grams themselves."""
    kept: list[str] = []
    grams: list[set[bytes]] = []
    by_gram: dict[bytes, list[int]] = {}
    for text in texts:
        mine = shingles(text, config.shingle)
        near = Counter(i for gram in mine for i in by_gram.get(gram, ()))
        if any(n / len(mine | grams[i]) >= config.threshold for i, n in near.items()):
            continue
        for gram in mine:
            by_gram.setdefault(gram, []).append(len(kept))
        kept.append(text)
        grams.append(mine)
    return kept


def measure(texts: list[str], config: DuplicatesFilter, seed: int) -> dict[str, Any]:
    """Recall by kind of copy, and precision over all."""
    chance = random.Random(seed)
    vocabulary = [word for text in texts for word in text.split()]
    kinds = list(CHANGES)
    items: list[tuple[int, str | None, str]] = []
    similar: dict[str, list[float]] = {kind: [] for kind in kinds}
    planted: dict[int, str] = {}
    for number, text in enumerate(texts):
        items.append((number, None, text))
        if number % 2:  # half of the texts have no copy
            kind = kinds[number // 2 % len(kinds)]
            copy = CHANGES[kind](text, vocabulary, chance)
            planted[number] = kind
            similar[kind].append(jaccard(text, copy, config.shingle))
            items.append((number, kind, copy))
    chance.shuffle(items)
    index = DuplicateIndex(config)
    removed: list[int] = []
    began = time.perf_counter()
    for number, kind, text in items:
        message = [{"role": "user", "content": f"{number} {kind}"}]
        if not index.keep(message, text):
            removed.append(number)
    seconds = time.perf_counter() - began
    found = Counter(planted[n] for n in set(removed) if n in planted)
    false = [n for n in removed if n not in planted]
    totals = Counter(planted.values())
    return {
        "texts": len(texts),
        "planted": len(planted),
        "removed": len(removed),
        "recall": {kind: found[kind] / totals[kind] for kind in kinds if totals[kind]},
        "jaccard": {kind: sum(v) / len(v) for kind, v in similar.items() if v},
        "precision": 1 - len(false) / len(removed) if removed else None,
        "false_alarms": len(false),
        "milliseconds_per_text": 1000 * seconds / len(items),
    }


def threshold_law(texts: list[str], config: DuplicatesFilter, seed: int) -> dict[str, float]:
    """Of copies on either side of the threshold, by their true similarity: how many are removed."""
    chance = random.Random(seed)
    vocabulary = [word for text in texts for word in text.split()]
    sides: dict[str, list[bool]] = {}
    for text in texts:
        copy = exchanged(chance.uniform(0.005, 0.25))(text, vocabulary, chance)
        truth = jaccard(text, copy, config.shingle)
        index = DuplicateIndex(config)
        index.keep([{"role": "user", "content": "a"}], text)
        removed = not index.keep([{"role": "user", "content": "b"}], copy)
        bucket = f"{int(truth * 10) / 10:.1f}-{int(truth * 10) / 10 + 0.1:.1f}"
        sides.setdefault(bucket, []).append(removed)
    return {bucket: sum(v) / len(v) for bucket, v in sorted(sides.items())}


def paraphrases(groups: dict[Any, list[str]], config: DuplicatesFilter) -> dict[str, Any]:
    """Samples of one prompt: how many are removed, and how alike they are."""
    index = DuplicateIndex(config)
    seen = removed = 0
    alike: list[float] = []
    for name, samples in groups.items():
        for number, text in enumerate(samples):
            kept = index.keep([{"role": "user", "content": f"{name} {number}"}], text)
            if number:
                seen += 1
                removed += not kept
                alike.append(jaccard(samples[0], text, config.shingle))
    return {
        "paraphrases": seen,
        "removed": removed / seen if seen else None,
        "jaccard": sum(alike) / len(alike) if alike else None,
    }


def read(path: Path, column: str, group: str | None) -> Iterator[tuple[Any, str]]:
    for row in pq.read_table(path).to_pylist():
        # GSM8K's answers have a calculator's notes in them.
        yield row[group] if group else None, re.sub("<<[^>]*>>", "", row[column] or "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="Parquet file with texts")
    parser.add_argument("--column", default="completion")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--paraphrases", help="column that samples of one prompt share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threshold", type=float, nargs="*", default=[0.6, 0.7, 0.8])
    parser.add_argument("--shingle", type=int, nargs="*", default=[2, 3, 5])
    arguments = parser.parse_args()
    rows = list(read(arguments.file, arguments.column, arguments.paraphrases))
    long = [(group, text) for group, text in rows if text and len(words(text)) >= 20]
    for n in arguments.shingle:
        for threshold in arguments.threshold:
            config = DuplicatesFilter(threshold=threshold, shingle=n)
            unique = apart([text for _, text in long], config)[: arguments.rows]
            result = {"shingle": n, "threshold": threshold}
            result |= measure(unique, config, arguments.seed)
            result["removed_by_similarity"] = threshold_law(unique[:400], config, arguments.seed)
            if arguments.paraphrases:
                groups: dict[Any, list[str]] = {}
                for group, text in long:
                    groups.setdefault(group, []).append(text)
                result["samples_of_one_prompt"] = paraphrases(groups, config)
            print(json.dumps(result))


if __name__ == "__main__":
    main()
