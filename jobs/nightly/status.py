"""How the last run went, in one file, and the webhook that is told."""

from __future__ import annotations

import json
import os
import urllib.request
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from tenacity import retry, stop_after_attempt, wait_exponential

from jobs.nightly.archive import Archive
from jobs.nightly.recipe import Recipe
from pipeline.errors import BudgetReached, TooManyErrors, UserError

State = Literal["running", "published", "unchanged", "failed", "stopped"]

ENDS: dict[type, str] = {BudgetReached: "budget", TooManyErrors: "errors"}
"""Ends of a night that the same command would have again, by their errors; as in the ledger."""

_WEBHOOK_SECONDS = 10
"""Longest wait for the webhook's answer, of each of three attempts."""


def now() -> str:
    """This moment, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Status:
    """A run, as `_nightly/status.json` shows it.

    Attributes:
        recipe: its name.
        state: of the whole run: the worst of its nights, or running.
        message: why it failed, or what it did, in a sentence.
        started, finished: ISO 8601.
        nights: state and message of each date, and which of ENDS it has, if any.
        not_told: why the webhook could not be told, if so.
    """

    recipe: str
    state: State = "running"
    message: str = ""
    started: str = field(default_factory=now)
    finished: str | None = None
    nights: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_told: str | None = None

    def record_night(
        self, date: str, state: State, message: str, error: BaseException | None = None
    ) -> None:
        """Say how a night went, and of which of ENDS it is, if it is of one."""
        self.nights[date] = {"state": state, "message": message, "at": now()}
        if (end := ENDS.get(type(error))) is not None:
            self.nights[date]["end"] = end

    def fail(self, message: str) -> None:
        """Say why the run as a whole could not be made."""
        self.state, self.message, self.finished = "failed", message, now()

    @property
    def end(self) -> str | None:
        """Which of ENDS all nights have that were not made; None: another, or not all the same."""
        ends = {each.get("end") for each in self.nights.values() if each["state"] == self.state}
        return ends.pop() if len(ends) == 1 else None

    def close(self) -> None:
        """Sum the nights up, unless the run as a whole has failed."""
        if self.finished is not None:
            return
        self.finished = now()
        for state in ("failed", "stopped", "published", "unchanged"):
            of_it = {d: n for d, n in self.nights.items() if n["state"] == state}
            if of_it:
                self.state = state
                self.message = "; ".join(f"{d}: {n['message']}" for d, n in of_it.items())
                return
        self.state, self.message = "unchanged", "there was no night to make"

    def save(self, archive: Archive) -> None:
        """Write the status file."""
        archive.put_json("status.json", asdict(self))


def webhook_url(recipe: Recipe) -> str | None:
    """Where to tell, looked up in the environment if the recipe says so.

    Raises:
        UserError: the variable is not set, or no URL.
    """
    if recipe.webhook is None:
        return None
    url, where = recipe.webhook, "webhook"
    if url.startswith("env:"):
        name = url.removeprefix("env:")
        where = f"webhook: the environment variable {name}"
        if name not in os.environ:
            raise UserError(f"{where} is not set")
        url = os.environ[name]
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{where}: must be an http or https URL, or env:NAME")
    return url


def notify(recipe: Recipe, status: Status) -> str | None:
    """Tell the webhook how a run went, if the recipe wants that.

    Returns:
        Why it could not be told; None if it was, or need not be. Never the URL, which is a secret
        with many services.
    """
    if recipe.webhook_on == "failure" and status.state != "failed":
        return None
    try:
        url = webhook_url(recipe)
        if url is not None:
            text = f"specbatch nightly {recipe.name}: {status.state}: {status.message}"
            _post(url, {"text": text, **asdict(status)})
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever a network may do
        return f"webhook: {type(error).__name__}"
    return None


@retry(stop=stop_after_attempt(3), wait=wait_exponential(0.5, max=5), reraise=True)
def _post(url: str, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=_WEBHOOK_SECONDS):
        pass
