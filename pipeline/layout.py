"""Every name in an output folder: what it is, and who writes it.

UNIT is a unit's id, SHA the beginning of the file's own SHA-256. All but the last three names are
an interface: a change is listed in CHANGELOG.md.
"""

from __future__ import annotations

COMPLETIONS = "completions"
"""UNIT.parquet: a unit's completed rows. Where it exists, the unit is done. `commit.sink`"""

ERRORS = "errors"
"""UNIT-SHA.parquet: a unit's failed rows, if it has any. `commit.sink`"""

TRACE = "trace"
"""UNIT-SHA.parquet: the rounds of a unit's rows, with `speculation.trace`. `commit.sink`"""

STATS = "stats"
"""TABLE.parquet: the job in tables, at its end. `commit.finish`"""

SUCCESS = "_SUCCESS"
"""Empty. Written last, once every row is accounted for. `commit.finish`"""

JOB = "_specbatch/job.json"
"""The job and its fingerprint: all that changes results. `commit.manifest`"""

INPUTS = "_specbatch/inputs.parquet"
"""The input files that the job was planned on. `commit.manifest`"""

MANIFEST = "_specbatch/manifest.json"
"""At the end: every file with its rows and checksum, versions, totals. `commit.finish`"""

HISTORY = "_specbatch/history"
"""UNIT-SHA.parquet: failed rows that `--only-failed` has tried again. `commit.retry`"""

LEDGER = "_specbatch/ledger"
"""RUN.json: one run, and who had which resources when. RUN/WORKER.json: the account of one process,
while the run goes on. `observe.ledger`"""

STATUS = "_specbatch/status.json"
"""The running driver's account of itself, renewed every few seconds. `observe.status`"""

STOP = "_specbatch/stop"
"""The wish that the driver stops. `observe.status`, for whoever asks"""

REPORT = "_specbatch/report.html"
"""The job's page, written whenever a run ends. `jobs.reports`"""

PROBE = "_specbatch/probe"
"""PROBE-RANDOM: written and deleted to see whether the storage keeps conditions. `storage`"""

STAGING = "_specbatch/staging"
"""Half-written files, on a disk only; S3 never has any. `storage`"""

LOCK = "_specbatch/lock"
"""Locked by whoever replaces a file, on a disk only. `storage`"""

ADDED_COLUMNS = frozenset(
    {
        "row_id",
        "completion",
        "finish_reason",
        "prompt_tokens",
        "output_tokens",
        "rounds",
        "drafted",
        "verified",
        "accepted",
        "acceptance_rate",
        "block_efficiency",
        "error_class",
        "error_message",
        "attempts",
        "raw_line",
    }
)
"""Columns of `completions/` and `errors/` beside the input's. No input column may have such a name;
in a job on another job's output, `input.prefix` renames them. Types: `commit.schema`"""

LOGPROBS, PROMPT_LOGPROBS = "logprobs", "prompt_logprobs"
OUTPUT_TOKEN_IDS = "output_token_ids"
CONTENT, REASONING, TOOL_CALLS, REASONING_TOKENS = MESSAGE = (
    *("content", "reasoning", "tool_calls", "reasoning_tokens"),
)
PARSED = "parsed"
LOGPROB_SUM, PERPLEXITY, SCORED_TOKENS = SCORE = "logprob_sum", "perplexity", "scored_tokens"
OPTIONAL_COLUMNS = (
    *(LOGPROBS, PROMPT_LOGPROBS, OUTPUT_TOKEN_IDS),
    *(*MESSAGE, PARSED, *SCORE),
)
"""Columns of `completions/` in jobs that ask for them, in order; only there are their names taken.
"""

_TABLE = ".parquet"


def is_added(name: str, added: frozenset[str]) -> bool:
    """Whether a column has the name of one of `added`. DuckDB and Spark tell no capitals."""
    return name.lower() in added


def completions(unit: str) -> str:
    """A unit's completions file."""
    return f"{COMPLETIONS}/{unit}{_TABLE}"


def unit_of(file: str) -> str | None:
    """The unit whose completions file would be called so in `completions/`; None: no unit's."""
    return file.removesuffix(_TABLE) if file.endswith(_TABLE) and "/" not in file else None


def attached(folder: str, unit: str, sha256: str) -> str:
    """A unit's file in ERRORS or TRACE.

    Named after its content, too: another attempt at the unit, which failed other rows, writes
    another file. The footer of the completions file says which one belongs to the unit.
    """
    return f"{folder}/{unit}-{sha256[:8]}{_TABLE}"


def superseded(errors: str) -> str:
    """Where a unit's errors file is kept once its rows were tried again."""
    return f"{HISTORY}/{errors.removeprefix(f'{ERRORS}/')}"


def stats(table: str) -> str:
    """A table of the job's statistics."""
    return f"{STATS}/{table}{_TABLE}"
