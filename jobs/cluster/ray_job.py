"""A command that runs as a Ray job, and ends it so that nobody retries what no retry can mend.

KubeRay makes a new cluster for a RayJob that failed, as long as its `backoffLimit` allows, and does
not look at exit codes. A RayJob whose Ray job was *stopped* is complete to it.
"""

from __future__ import annotations

import json
import os
import time

from jobs.terminal.console import note

STOP_VARIABLE = "SPECBATCH_STOP_RAY_JOB"
"""Where this is set, a Ray job that would fail in the same way again is stopped instead."""

_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""In which Ray tells a job's processes what job they are of."""

_SIGNAL_SECONDS = 60.0
"""For which the end of this process is waited for, once Ray is asked to stop its job."""


def stop_own_job() -> None:
    """Have Ray stop the job that this process runs in, which ends the process.

    It returns if Ray does not do so; then the job fails by its exit code.
    """
    try:
        job = json.loads(os.environ[_CONFIG_VARIABLE])["metadata"]["job_submission_id"]
        from ray.job_submission import JobSubmissionClient

        note("no retry can mend this; the Ray job is stopped, so that there is none")
        JobSubmissionClient().stop_job(job)
        time.sleep(_SIGNAL_SECONDS)
    except Exception as error:  # whatever it is, the job has ended, and says why
        note(f"the Ray job could not be stopped: {type(error).__name__}: {error}")
