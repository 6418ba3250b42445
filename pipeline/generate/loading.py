"""A job's models, acceptance head and engine, made as the job says."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.config.job import JobConfig


def load_pair(job: JobConfig) -> Any:
    """The job's models, loaded (`specdec.loading.pair.ModelPair`).

    Raises:
        PairError: they are missing, unsupported, or do not fit together.
    """
    from specdec.loading.pair import ModelPair

    models = job.models
    # An actor that asked for no GPU must not take one that happens to be there.
    device = models.device or (None if job.actors.num_gpus else "cpu")
    return ModelPair.load(
        models.target,
        models.draft if job.speculation.policy != "none" else None,
        dtype=models.dtype,
        quantization=models.quantization,
        draft_quantization=models.draft_quantization,
        deterministic=models.deterministic,
        device=device,
        device_map=models.device_map,
        trust_remote_code=models.trust_remote_code,
    )


def load_acceptance_head(job: JobConfig, pair: Any) -> Any:
    """The job's acceptance head, or None if it has none.

    Raises:
        PairError: it is missing, damaged, or was trained for another pair.
    """
    from specdec.loading.head_files import load_head

    folder = job.speculation.head
    return load_head(folder, pair) if folder is not None else None


def make_engine(job: JobConfig, pair: Any, head: Any, decode: Callable[..., str]) -> Any:
    """The job's engine (`specdec.engine.engine.Engine`).

    Args:
        job: the job.
        pair: its models.
        head: its acceptance head, if it has one.
        decode: token ids to text.
    """
    from specdec.engine.engine import Engine
    from specdec.policies.registry import make_policy

    speculation, actors = job.speculation, job.actors
    memory = actors.kv_memory_gb
    return Engine(
        pair,
        policy=make_policy(
            speculation.policy,
            k=speculation.k,
            k_min=speculation.k_min,
            k_max=speculation.k_max,
            threshold=speculation.threshold,
            estimator=speculation.estimator,
            head=head,
        ),
        verification=speculation.verification,
        slots=actors.slots,
        kv_memory_bytes=int(memory * 1e9) if memory else None,
        decode=decode,
        control_share=speculation.control_share if speculation.policy != "none" else 0.0,
        trace=speculation.trace,
    )


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
        gc.enable()
