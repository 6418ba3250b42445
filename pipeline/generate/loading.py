"""A job's models, acceptance head and engine, made as the job says.

What needs torch is imported where it is used: the driver of a job imports this module, too.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.config.job import JobConfig, ModelsConfig
from pipeline.errors import UserError
from pipeline.generate.corpus import job_corpus


def load_pair(job: JobConfig) -> Any:
    """The models that the job runs, loaded (`specdec.loading.pair.ModelPair`).

    Raises:
        UserError: they are missing, unsupported, or do not fit together.
    """
    return load_models(job.models, job_device(job), draft=job.drafts)


def job_device(job: JobConfig) -> str | None:
    """The device of the job's models; None: a GPU if there is one."""
    # An actor that asked for no GPU must not take one that happens to be there.
    return job.models.device or (None if job.actors.num_gpus else "cpu")


def load_models(models: ModelsConfig, device: str | None, *, draft: bool = True) -> Any:
    """Target and draft, loaded (`specdec.loading.pair.ModelPair`).

    Args:
        models: which, and how.
        device: where, unless `models.device_map` says so; None: a GPU if there is one.
        draft: whether to load the draft, too.

    Raises:
        UserError: they are missing, unsupported, or do not fit together.
    """
    with _uncollected():
        from specdec.loading.pair import ModelPair

    with refusals():
        return ModelPair.load(
            models.target,
            models.draft if draft else None,
            dtype=models.dtype,
            kv_dtype=models.kv_dtype,
            quantization=models.quantization,
            draft_quantization=models.draft_quantization,
            deterministic=models.deterministic,
            device=device,
            device_map=models.device_map,
            trust_remote_code=models.trust_remote_code,
        )


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector, which takes a quarter of the time to import transformers."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def load_acceptance_head(job: JobConfig, pair: Any) -> Any:
    """The job's acceptance head, or None if it has none.

    Raises:
        UserError: it is missing, damaged, or was trained for another pair.
    """
    from specdec.loading.head_files import load_head

    folder = job.speculation.head
    with refusals():
        return load_head(folder, pair) if folder is not None and job.drafts else None


@contextmanager
def refusals() -> Iterator[None]:
    """What specdec refuses to load, the user can fix: its `PairError` becomes a `UserError`."""
    from specdec.loading.sources import PairError

    try:
        yield
    except PairError as error:
        raise UserError(str(error)) from error


def make_engine(job: JobConfig, pair: Any, head: Any) -> Any:
    """The job's engine (`specdec.engine.engine.Engine`).

    Args:
        job: the job.
        pair: its models.
        head: its acceptance head, if it has one.
    """
    from pipeline.texts import Texts
    from specdec.engine.admission import memory_by_default
    from specdec.engine.engine import Engine
    from specdec.loading.grammars import ModelGrammars
    from specdec.policies.registry import make_policy

    speculation, actors = job.speculation, job.actors
    if actors.kv_memory_gb:
        memory = int(actors.kv_memory_gb * 1e9)
    else:
        share = actors.memory_share(os.cpu_count() or 1)
        memory = memory_by_default(pair.target.device, share)
    return Engine(
        pair,
        policy=make_policy(
            speculation.policy if job.generates else "none",
            k=speculation.k,
            k_min=speculation.k_min,
            k_max=speculation.k_max,
            width=speculation.width,
            threshold=speculation.threshold,
            estimator=speculation.estimator,
            head=head,
        ),
        verification=speculation.verification,
        slots=actors.slots,
        kv_memory_bytes=memory,
        decode=Texts(pair.tokenizer).decode,
        grammars=ModelGrammars(pair.tokenizer, pair.vocab_size, pair.eos_token_ids),
        control_share=speculation.control_share,
        trace=speculation.trace,
        lookup=speculation.lookup,
        corpus=job_corpus(job, pair.tokenizer, pair.vocab_size),
    )


MADE_IN_ROUNDS = 20_000
"""Objects that are made before the collector looks at those that are young.

A round of 256 rows makes some thousands and lets go of them by itself. Raised, what refers to
itself stays in memory for longer. At Python's 700 the collector takes 4% of such a round on a GPU's
clock.
"""


@contextmanager
def lasting() -> Iterator[None]:
    """What is made in here lasts as long as the process: the garbage collector passes over it.

    Otherwise it goes through half a million objects of torch, transformers and Ray again and again
    while they are imported, now and then in a round, and twice when the process ends.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.collect()  # what loading leaves behind may hold weights
        gc.freeze()
        gc.set_threshold(MADE_IN_ROUNDS)
        gc.enable()
