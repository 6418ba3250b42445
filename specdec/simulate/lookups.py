"""What would be looked up along texts, as the rows of an engine would meet it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from specdec.drafters.suffix import SuffixIndex
from specdec.engine.scheduler import LiveRow
from specdec.model.sharing import common_prefix
from specdec.policies.base import MOST_CANDIDATES
from specdec.policies.chains import Chain, Evidence
from specdec.request import Request
from specdec.simulate.transcripts import LookedUp


def look_up(
    texts: Sequence[tuple[Request, Sequence[int]]], index: SuffixIndex, live: int
) -> list[LookedUp]:
    """Look candidates up at every place of some texts.

    All rows grow by a token a round, as without speculation. So a row finds of the others what they
    had written by then. What it finds of its own text is the same whatever a policy does.

    Args:
        texts: requests and their outputs.
        index: reads the texts in rounds of `live` rows, which are refilled in order.
        live: rows side by side.
    """
    chains: list[list[Chain]] = [[] for _ in texts]
    waiting = deque(enumerate(texts))
    rows: list[tuple[int, LiveRow]] = []
    while waiting or rows:
        while waiting and len(rows) < live:
            number, (request, _) = waiting.popleft()
            prompt = list(request.prompt_ids)
            rows.append((number, LiveRow(request, request.sampling, prompt, len(prompt))))
        for number, row in rows:
            chains[number].append(index.chain(row, MOST_CANDIDATES))
            row.tokens.append(texts[number][1][row.generated])
        for _, row in rows:
            index.read(row)
        rows = [(i, row) for i, row in rows if row.generated < len(texts[i][1])]
    return [_joined(own, output) for own, (_, output) in zip(chains, texts, strict=True)]


def _joined(chains: Sequence[Chain], output: Sequence[int]) -> LookedUp:
    """The chains of one text, and how far it goes on with each."""
    tokens = [token for chain in chains for token in chain.tokens]
    evidence = [each for chain in chains for each in chain.evidence]
    stood = [common_prefix(chain.tokens, output[at:]) for at, chain in enumerate(chains)]
    return LookedUp(
        np.array([len(chain.tokens) for chain in chains], dtype=np.int64),
        np.array(stood, dtype=np.int64),
        np.array(tokens, dtype=np.int64),
        np.array(evidence, dtype=np.int64).reshape(-1, len(Evidence)),
    )
