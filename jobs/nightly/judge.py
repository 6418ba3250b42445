"""The judge: one more job of a night, which scores its conversations."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from jobs.nightly.archive import WorkFolder
from jobs.nightly.conversations import (
    CONVERSATION,
    Conversation,
    Generated,
    OnTurn,
    answers,
    check_losses,
    run_step,
    step_job,
    write_rows,
)
from jobs.nightly.expressions import Expression, TurnError
from jobs.nightly.filters import JUDGE
from jobs.nightly.judge_settings import JudgeConfig, judged
from jobs.nightly.recipe import Recipe
from jobs.nightly.seeds import Templates
from jobs.nightly.structured import read_structured
from pipeline.config.job import JobConfig

_NOT_JUDGED = (
    "{:,} judgements were cut off or gave no score; raise judge.sampling.max_new_tokens, or bound "
    "what the judge may write"
)


class Judge:
    """Scores conversations, and removes those below the threshold.

    Args:
        config: the recipe's section.

    Attributes:
        scores: of all conversations that it has judged, removed ones included.
        matched, removed: conversations below the threshold; the same here.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._score = Expression(config.score)
        self.scores: list[float] = []
        self.removed: Counter[str] = Counter()

    @property
    def names(self) -> list[str]:
        """The filter that it is, if it has a threshold."""
        return [] if self._config.threshold is None else [JUDGE]

    @property
    def matched(self) -> Counter[str]:
        """As `removed`."""
        return self.removed

    def judge(
        self,
        recipe: Recipe,
        night: JobConfig,
        work: WorkFolder,
        made: Generated,
        on_turn: OnTurn | None,
        stop: threading.Event | None,
    ) -> list[Conversation]:
        """Have all conversations of a night scored, or those that are not yet.

        Args:
            recipe: the recipe.
            night: the job of its turns, with the models of this night.
            work: where the judge's job is.
            made: the conversations; counts what the judge costs, and what is lost.
            on_turn, stop: as in `generate`.

        Returns:
            Those that are good enough, in order.

        Raises:
            UserError, JobStopped, JobFailed, TooManyErrors: as `generate`.
        """
        templates = Templates(recipe, work.date)
        asked: dict[str, Conversation] = {}
        rows: dict[str, Any] = {}
        for each in made.conversations:
            said = {name: getattr(each, name) for name in ("completions", "parsed", "messages")}
            try:
                rows[each.id] = templates.to_judge(each.prompt.seed, **said)
            except TurnError:
                made.lost["TemplateError"] += 1
                continue
            asked[each.id] = each
        if not asked:
            return []
        write_rows(work, "judge", rows)
        base = night if self._config.models is None else recipe.job  # without the night's head
        job = step_job(self._config.job(base), recipe, work, "judge")
        made.judged += run_step(job, recipe, work, "judge", made, on_turn, stop)
        for row in answers(work.output("judge")):
            if (conversation := asked.get(row[CONVERSATION])) is not None:
                self._book(conversation, row["completion"], row["finish_reason"], made)
        check_losses(made, recipe, lambda: _NOT_JUDGED.format(made.lost["NotJudged"]))
        return [each for each in asked.values() if self._keep(each)]

    def _book(self, each: Conversation, text: str, finish_reason: str, made: Generated) -> None:
        """Note what the judge said of a conversation; it is lost if that is no judgement."""
        wanted = self._config.sampling.structured_outputs
        assert wanted is not None, "a judge has structured outputs"
        found = read_structured(text, finish_reason, wanted)
        try:
            if found is None:
                raise TurnError("it is not what it must be")
            each.score = self._score(judged(found[0]))
        except TurnError:
            made.lost["NotJudged"] += 1
            return
        each.judgement, each.judged = text.strip(), found[0]
        self.scores.append(each.score)

    def _keep(self, each: Conversation) -> bool:
        if each.score is None:
            return False
        least = self._config.threshold
        if least is not None and each.score < least:
            self.removed[JUDGE] += 1
            return False
        return True
