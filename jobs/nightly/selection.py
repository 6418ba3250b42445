"""The last filters: duplicates, and the best of a prompt's samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from jobs.nightly.conversations import Conversation, Generated
from jobs.nightly.duplicates import DuplicateIndex
from jobs.nightly.expressions import Expression, TurnError
from jobs.nightly.filters import SELECT
from jobs.nightly.judge_settings import SelectConfig


class Selection:
    """Keeps the best samples of each prompt that are no duplicates.

    The samples are looked at from the best to the worst. So a duplicate of something published
    makes room for the next one, and what is not published makes no duplicate of anything.

    Args:
        config: the recipe's section; None: all samples are kept, in order.
        duplicates: what is there already; None: duplicates are kept, too.

    Attributes:
        matched: conversations that are not among the best of their prompt.
        removed: those of them that were no duplicates.
    """

    def __init__(self, config: SelectConfig | None, duplicates: DuplicateIndex | None) -> None:
        self._config, self._duplicates = config, duplicates
        self._by = Expression(config.by) if config is not None else None
        self.matched: Counter[str] = Counter()
        self.removed: Counter[str] = Counter()

    @property
    def names(self) -> list[str]:
        """The filter that it is, if anything is selected."""
        return [SELECT] if self._config is not None else []

    def keep(self, made: Generated, conversations: Sequence[Conversation]) -> list[Conversation]:
        """The conversations to publish, in their order.

        Args:
            made: counts those that cannot be ranked as lost.
            conversations: those of a prompt side by side.
        """
        kept: list[Conversation] = []
        for _, samples in groupby(conversations, key=lambda each: each.stem):
            ranked = self._ranked(made, list(samples))
            most = self._config.keep if self._config is not None else len(ranked)
            self.matched[SELECT] += max(0, len(ranked) - most)
            best: list[Conversation] = []
            for each in ranked:
                if len(best) == most:
                    self.removed[SELECT] += 1
                elif self._duplicates is None or self._duplicates.keep(each.messages, each.text):
                    best.append(each)
            kept += sorted(best, key=lambda each: each.sample)
        return kept

    def _ranked(self, made: Generated, samples: list[Conversation]) -> list[Conversation]:
        """From the best to the worst; of equals, the first one is better."""
        if self._by is None:
            return samples
        values: dict[int, float] = {}
        for each in samples:
            known = {
                "logprob": each.logprob,
                "score": each.score,
                "judgement": each.judged,
                "completions": each.completions,
                "parsed": each.parsed,
                "output_tokens": each.output_tokens,
            }
            try:
                values[each.sample] = self._by(known)
            except TurnError:
                made.lost["SelectError"] += 1
        left = [each for each in samples if each.sample in values]
        return sorted(left, key=lambda each: (-values[each.sample], each.sample))
