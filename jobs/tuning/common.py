"""What the commands of this room do alike: options, loading models, completing rows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.config.job import JobConfig, SpeculationConfig
from pipeline.config.locations import is_url
from pipeline.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and `--help` needs none of it
    from specdec.loading.pair import ModelPair
    from specdec.request import Request
    from specdec.simulate.transcripts import Text

Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default=False)]


def absolute(path: str) -> str:
    """A path that does not depend on the working directory; URLs stay as they are."""
    return path if is_url(path) else os.path.abspath(Path(path).expanduser())


@contextmanager
def user_errors() -> Iterator[None]:
    """What specdec refuses to load or to train, the user can fix: it becomes a `UserError`."""
    from specdec.loading.sources import PairError
    from specdec.training.settings import DistillError

    try:
        yield
    except (PairError, DistillError) as error:
        raise UserError(str(error)) from None


def silence_transformers() -> None:
    """Keep transformers from printing bars, and warnings of what is meant to be so.

    A draft that shares the target's embedding looks corrupted to it. What is wrong with a model is
    said by checks of ours.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def complete(
    job: JobConfig, pair: ModelPair, requests: Sequence[Request], left_out: Counter[str]
) -> Iterator[Text]:
    """The target's own completions, without speculation, in the order of the requests.

    Args:
        job: its verification, slots and memory.
        pair: its models.
        requests: their ids must differ.
        left_out: why requests have no completion; counted here.

    Yields:
        Each completion of at least one token, in the group of its input file.
    """
    from pipeline.generate.loading import make_engine
    from pipeline.inputs.row_ids import parse_row_id
    from specdec.simulate.transcripts import Text
    from specdec.training.labels import continuations

    alone = SpeculationConfig(policy="none", verification=job.speculation.verification)
    job = job.model_copy(update={"speculation": alone})
    engine = make_engine(job, pair, None)
    asked = {request.id: request for request in requests}
    for done in continuations(engine, requests):
        if done.error is not None:
            left_out[done.error] += 1
        elif done.output_ids:
            yield Text(asked[done.id], done.output_ids, parse_row_id(done.id).file)


def told(left_out: Counter[str]) -> str:
    """How many rows were left out, and the most frequent reason; empty if none were."""
    if not left_out:
        return ""
    reason, _ = left_out.most_common(1)[0]
    return f"{left_out.total():,} rows were left out, most often: {reason}"
