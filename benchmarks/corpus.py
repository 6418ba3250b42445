"""A corpus of made-up tokens: how long it takes to build, how large it is, what a look-up takes.

    python benchmarks/corpus.py --tokens 10000000

Texts of 500 tokens each, drawn independently by Zipf's law: the worst case, in which hardly a
context of four tokens or more comes twice. Look-ups are of contexts that are there, and of others.
Prints times of the process, not of the clock on the wall, in half a minute.
"""

from __future__ import annotations

import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from common import console, run

from specdec.drafters.corpus import LENGTHS, Corpus, build_corpus

VOCABULARY, TEXT, LOOKUPS = 49_152, 500, 20_000


def look_up(corpus: Corpus, contexts: list[list[int]]) -> float:
    """Microseconds of a look-up."""
    began = time.process_time()
    for context in contexts:
        corpus.after(context)
    return (time.process_time() - began) / len(contexts) * 1e6


def main(
    tokens: Annotated[int, typer.Option(help="tokens of all texts")] = 10_000_000,
) -> None:
    """Build one and ask it."""
    drawn = np.random.default_rng(0).zipf(1.2, tokens)
    ids = np.minimum(drawn, VOCABULARY - 1).astype(np.uint32)
    texts = [ids[at : at + TEXT] for at in range(0, tokens, TEXT)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.corpus"
        began = time.process_time()
        build_corpus(texts, path, "made up")
        console.print(f"built in {time.process_time() - began:.1f} s")
        corpus = Corpus(path, "made up")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        console.print(f"{path.stat().st_size / 1e6:.0f} MB; {peak:.1f} GB of memory at most")
        chosen = random.Random(0)
        for n in LENGTHS:
            begins = [chosen.randrange(tokens // TEXT) * TEXT for _ in range(LOOKUPS)]
            there = [ids[at : at + n].tolist() for at in begins]
            others = [[(token + 777) % VOCABULARY for token in each] for each in there]
            hit, miss = (look_up(corpus, contexts) for contexts in (there, others))
            console.print(f"{n} tokens: {hit:.1f} µs where known, {miss:.1f} µs elsewhere")


if __name__ == "__main__":
    run(__doc__, main)
