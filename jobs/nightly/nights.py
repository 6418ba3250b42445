"""A run: one night or several, under the dataset's lock, with one file that says how it went."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import date as Date

from jobs.nightly.archive import Archive, Night
from jobs.nightly.conversations import OnTurn
from jobs.nightly.lock import Lock, LockLost, locked
from jobs.nightly.night import make_night, refresh, write_report
from jobs.nightly.recipe import Recipe
from jobs.nightly.status import State, Status, notify, webhook_url
from pipeline.errors import JobStopped, TooManyErrors, UserError

Dates = Callable[[Archive], Sequence[Date]]
"""Says which nights are to be made, once the dataset is locked."""


@dataclass
class Hooks:
    """What a run calls on its way, and what can stop it.

    Attributes:
        on_night: called with each night's date before it is made.
        on_turn: as in `generate`.
        on_learning: called with what is being learned from a night, stage by stage.
        stop: set it to stop once what is in flight is committed.
    """

    on_night: Callable[[Date], None] = lambda date: None
    on_turn: OnTurn | None = None
    on_learning: Callable[[str], None] = lambda stage: None
    stop: threading.Event | None = None


def run_nights(recipe: Recipe, dates: Dates, hooks: Hooks | None = None) -> Status:
    """Make nights, the earlier ones first. A night that fails does not keep the next from being
    made, but the whole run then counts as failed.

    Raises:
        UserError: another run is at work, or the dataset is out of reach.
    """
    hooks = hooks or Hooks()
    archive = Archive.of(recipe)
    status = Status(recipe.name)
    try:
        webhook_url(recipe)
        with locked(archive.folder, recipe.lock_minutes * 60) as lock:
            status.save(archive)
            try:
                _all(recipe, archive, dates(archive), lock, status, hooks)
            except BaseException as error:
                status.fail(_reason(error))
                raise
            finally:
                status.close()
                status.save(archive)
    except Exception as error:
        status.fail(_reason(error))
        raise
    finally:
        status.not_told = notify(recipe, status)
    return status


def _all(
    recipe: Recipe,
    archive: Archive,
    dates: Sequence[Date],
    lock: Lock,
    status: Status,
    hooks: Hooks,
) -> None:
    published = set(archive.dates())
    some_to_make = any(date.isoformat() not in published for date in dates)
    with _ray() if some_to_make else nullcontext():
        for date in dates:
            hooks.on_night(date)
            name = date.isoformat()
            try:
                night, new = make_night(
                    recipe, archive, date, lock, on_turn=hooks.on_turn, stop=hooks.stop
                )
                state: State = "published" if new else "unchanged"
                status.record_night(name, state, _size(night) if new else "was published before")
                if new:
                    write_report(recipe, archive, night)
                _learn(recipe, archive, night, status, hooks)
            except LockLost:
                raise
            except (JobStopped, KeyboardInterrupt) as error:
                why = str(error) or "it was asked to stop"
                words = f"{why}; the same command goes on from there"
                status.record_night(name, "stopped", words, error)
                break
            except Exception as error:
                status.record_night(name, "failed", _reason(error), error)
            status.save(archive)
    refresh(recipe, archive)


def _learn(recipe: Recipe, archive: Archive, night: Night, status: Status, hooks: Hooks) -> None:
    """Let the latest night teach the pair, if the recipe wants that and it has not yet."""
    wanted = recipe.improve.head or recipe.improve.draft
    if not wanted or night.date != archive.dates()[-1]:
        return
    if archive.improvement(night.date) is not None:
        return
    from jobs.nightly.improve import improve

    def show(stage: str) -> None:
        if hooks.stop is not None and hooks.stop.is_set():
            raise JobStopped
        hooks.on_learning(stage)

    try:
        record = improve(recipe, archive, night, show)
    except (JobStopped, KeyboardInterrupt):
        raise
    except Exception as error:
        message = f"published, but nothing was learned from it: {_reason(error)}"
        status.record_night(night.date, "failed", message)
        return
    write_report(recipe, archive, night)
    told = "; ".join(f"{each['what']}: {each['decision']}" for each in record["candidates"])
    status.nights[night.date]["learned"] = told or record.get("why", "")


def _ray() -> AbstractContextManager[None]:
    from pipeline.run.ray_session import connected

    return connected()


def _size(night: Night) -> str:
    """How many rows there are, and what took the others away."""
    filtered = {each["name"]: each["removed"] for each in night.filters if each["removed"]}
    gone = [f"{why} {count:,}" for why, count in (night.lost | filtered).items()]
    without = f" (gone: {', '.join(gone)})" if gone else ""
    return f"{night.total_rows:,} rows of {night.conversations:,} conversations{without}"


def _reason(error: BaseException) -> str:
    own_words = isinstance(error, UserError | TooManyErrors)
    return str(error) if own_words else f"{type(error).__name__}: {error}"
