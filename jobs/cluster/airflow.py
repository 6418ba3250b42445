"""A job as an Airflow DAG."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from jobs.terminal.console import HOPELESS
from pipeline.config.job import JobConfig


def airflow_dag(
    job: JobConfig,
    command: Sequence[str],
    schedule: str | None,
    folder: Path,
    time_zone: str = "UTC",
) -> str:
    """An Airflow DAG of one task. Airflow fills in its own templates, such as {{ ds }}.

    The codes that a retry cannot mend are those with which BashOperator skips a task, since that
    is the one way in which it tells codes apart; the task then fails instead.
    """
    line = " ".join(shlex.quote(word) for word in command)
    return f'''"""The job {job.name}, submitted by specbatch; a retry resumes it."""

from datetime import timedelta

import pendulum
from airflow.exceptions import AirflowFailException, AirflowSkipException

try:
    from airflow.providers.standard.operators.bash import BashOperator
    from airflow.sdk import DAG
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.operators.bash import BashOperator


class Specbatch(BashOperator):
    """Fails without a retry where that would end the same way."""

    def execute(self, context):
        try:
            return super().execute(context)
        except AirflowSkipException as error:
            raise AirflowFailException(f"no retry can mend this: {{error}}") from None


with DAG(
    dag_id={job.name!r},
    schedule={schedule!r},
    start_date=pendulum.datetime(2026, 1, 1, tz={time_zone!r}),
    catchup=False,
    max_active_runs=1,
):
    Specbatch(
        task_id="run",
        bash_command={line!r},
        cwd={str(folder)!r},
        append_env=True,  # RAY_API_SERVER_ADDRESS and the token, as the Airflow worker has them
        skip_on_exit_code={list(HOPELESS)!r},  # a mistake, a spent budget, too many failed rows
        retries=2,
        retry_delay=timedelta(minutes=5),
    )
'''
