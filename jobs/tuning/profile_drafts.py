"""Several drafts of one target side by side, and look-ups, which need none."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.terminal.display import Show
from jobs.tuning.profile_draft import COST_SECONDS, batches_of, mean_prompt, profile_draft
from jobs.tuning.profile_report import CLEARLY, LOOK_UPS, NONE, PAYS, which_draft
from pipeline.config.job import JobConfig, SpeculationConfig

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    from specdec.loading.pair import ModelPair
    from specdec.policies.costs import CostTable
    from specdec.simulate.transcripts import Text


def profile_drafts(
    job: JobConfig,
    names: Sequence[str],
    complete: Callable[[ModelPair], Sequence[Text]],
    show: Show,
) -> dict[str, Any]:
    """Compare drafts on the same texts, at the same costs of the target.

    Args:
        job: says which target, and how it samples, verifies and is batched.
        names: of the drafts; NONE among them changes nothing.
        complete: makes the texts with the target of a pair.
        show: told what is being done.

    Returns:
        Plain data.

    Raises:
        UserError: a draft cannot be loaded, or does not fit the target.
    """
    from pipeline.generate.loading import job_device, load_acceptance_head, load_models
    from specdec.simulate.record import measure_costs

    drafts: dict[str, Any] = {}
    texts: Sequence[Text] = ()
    verify: CostTable | None = None
    looked_up: dict[str, Any] = {}
    wanted: list[str | None] = [name for name in dict.fromkeys(names) if name != NONE]
    for name in wanted or [None]:
        show("loading models" if name is None else f"loading {name}")
        own = name is not None and job.models.draft in (name, os.path.abspath(name))
        models = job.models.model_copy(update={"draft": name})
        pair = load_models(models, job_device(job), draft=name is not None)
        if not texts:
            texts = complete(pair)
            show("looking up")
            looked_up = _look_up(job, pair, texts)
        if name is None:
            show("measuring costs")
            slots, prompt = job.actors.slots, mean_prompt(texts)
            verify = measure_costs(pair, slots, prompt, COST_SECONDS).verify
            continue
        head = load_acceptance_head(job, pair) if own else None
        found, costs = profile_draft(job, pair, head, texts, show, verify)
        verify, drafts[name] = costs.verify, found
        del pair
        gc.collect()  # before the next one is loaded
    assert verify is not None, "there is a draft, or none"
    by_live = [
        _side_by_side(live, place, drafts, looked_up, verify)
        for place, live in enumerate(batches_of(job.actors.slots))
    ]
    return {
        "rows": len(texts),
        "output_tokens": sum(len(text.output_ids) for text in texts),
        "verification": job.speculation.verification,
        "drafts": drafts,
        "look_ups": looked_up,
        "costs": {"verify": verify.points()},
        "by_live": by_live,
        "recommendation": {"reasons": list(which_draft(by_live))},
    }


def _look_up(job: JobConfig, pair: ModelPair, texts: Sequence[Text]) -> dict[str, Any]:
    """What the policy `suffix` proposes for the rows, and what becomes of that."""
    from pipeline.generate.loading import make_engine

    ours = job.speculation
    suffix = SpeculationConfig(
        policy="suffix", verification=ours.verification, corpus=ours.corpus, control_share=0
    )
    engine = make_engine(job.model_copy(update={"speculation": suffix}), pair, None)
    engine.generate([text.request for text in texts])
    counts = engine.stats.counts
    # A row's first token comes with its prompt.
    rounds = max(counts.rounds - len(texts), 1)
    return {
        "candidates_a_round": counts.verified / rounds,
        "acceptance_rate": counts.accepted / counts.verified if counts.verified else None,
        "tokens_a_round": (counts.committed - len(texts)) / rounds if counts.verified else 1.0,
    }


def _side_by_side(
    live: int,
    place: int,
    drafts: Mapping[str, Any],
    looked_up: Mapping[str, Any],
    verify: CostTable,
) -> dict[str, Any]:
    """All at one live batch, which is number `place` of those that were tried."""
    none = float(verify(live))
    # Rounds pack more or fewer tokens: between whole numbers, costs are on a line.
    whole, part = divmod(live * (1 + looked_up["candidates_a_round"]), 1)
    seconds = (1 - part) * float(verify(int(whole))) + part * float(verify(int(whole) + 1))
    speedup = {LOOK_UPS: looked_up["tokens_a_round"] * none / seconds}
    intervals: dict[str, list[float]] = {}
    for name, found in drafts.items():
        at = found["predictions"][place]
        speedup[name], intervals[name] = at["speedup"]["goodput"], at["goodput_interval"]
    best = max(speedup, key=lambda name: speedup[name])
    if speedup[best] <= CLEARLY * speedup[LOOK_UPS]:
        best = LOOK_UPS  # nothing to load
    return {
        "live": live,
        "none_tokens_per_second": live / none,
        "speedup": speedup,
        "interval": intervals,
        "use": best if speedup[best] >= PAYS else NONE,
    }
