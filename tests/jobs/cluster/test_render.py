from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from jobs.cli import app
from jobs.cluster.manifests import kubernetes_name, quoted
from pipeline.config.job import JobConfig

# Fields of KubeRay's v1 types that are in use; an unknown one would be dropped in silence.
RAY_JOB_SPEC = {
    "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata",
    "clusterSelector", "submitterConfig", "managedBy", "deletionStrategy", "entrypoint",
    "runtimeEnvYAML", "jobId", "submissionMode", "entrypointResources", "entrypointNumCpus",
    "entrypointNumGpus", "ttlSecondsAfterFinished", "shutdownAfterJobFinishes", "suspend",
}  # fmt: skip
RAY_CLUSTER_SPEC = {
    "suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations", "authOptions",
    "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec", "rayVersion",
    "workerGroupSpecs", "upgradeStrategy",
}  # fmt: skip
WORKER_GROUP_SPEC = {
    "suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds",
    "resources", "labels", "rayStartParams", "template", "scaleStrategy", "numOfHosts",
}  # fmt: skip


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    job = {
        "name": "My_Job.1",
        "input": {"paths": ["s3://b/prompts"], "prompt_column": "prompt"},
        "output": "s3://b/out",
        "models": {"target": "org/big", "draft": "org/small"},
        "actors": {"min": 2, "max": 4, "num_gpus": 1, "num_cpus": 3.5},
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    return file


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["render", *map(str, arguments)])


def documents(*arguments: object) -> list[Any]:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return list(yaml.safe_load_all(result.stdout))


def check_ray_job(spec: dict[str, Any]) -> None:
    """Checks what any RayJob of ours must be."""
    assert set(spec) <= RAY_JOB_SPEC
    cluster = spec["rayClusterSpec"]
    assert set(cluster) <= RAY_CLUSTER_SPEC
    assert set(cluster["headGroupSpec"]) <= {"template", "rayStartParams"}
    assert spec["shutdownAfterJobFinishes"] is True
    # A stopped job gets the time to commit what is in flight, and what is hopeless is stopped.
    runtime_env = yaml.safe_load(spec["runtimeEnvYAML"])
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": "3600", "SPECBATCH_STOP_RAY_JOB": "1"}
    assert runtime_env == {"env_vars": variables}
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= WORKER_GROUP_SPEC
    for template in [
        g["template"] for g in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]:
        [container] = template["spec"]["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}


def test_a_ray_job(job_file: Path) -> None:
    secrets, volume = ("--secret", "keys", "--secret", "hub"), ("--volume", "claim:/data")
    config_map, job = documents(
        "kuberay", job_file, "--image", "i:1", *secrets, *volume, "--token-auth"
    )
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec = job["spec"]
    check_ray_job(spec)
    assert spec["entrypoint"] == "specbatch run /etc/specbatch/job.yaml"
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    [workers] = cluster["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["replicas"], workers["maxReplicas"]) == (2, 2, 4)
    [container] = workers["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert limits == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": "1"}
    assert container["envFrom"] == [{"secretRef": {"name": n}} for n in ("keys", "hub")]

    # What the pods read is the job.
    assert config_map["metadata"]["name"] == job["metadata"]["name"]
    inside = JobConfig.model_validate(yaml.safe_load(config_map["data"]["job.yaml"]))
    assert inside == JobConfig.model_validate(yaml.safe_load(job_file.read_text()))


def test_groups_of_actors_are_groups_of_workers(job_file: Path) -> None:
    groups = "actors.groups={A100: {num_gpus: 1}, cpu_only: {num_gpus: 0, max: 9}}"
    _, job = documents("kuberay", job_file, "--image", "i", "--set", groups)
    check_ray_job(job["spec"])
    found = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in found] == ["a100", "cpu-only"]
    assert found[1]["maxReplicas"] == 9


def test_groups_whose_names_kubernetes_would_take_for_one_are_told_apart(job_file: Path) -> None:
    groups = "actors.groups={A_1: {}, a-1: {}, B: {}}"
    _, job = documents("kuberay", job_file, "--image", "i", "--set", groups)
    names = [each["groupName"] for each in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    assert len(set(names)) == 3
    assert names[0].startswith("a-1-") and names[1].startswith("a-1-") and names[2] == "b"


def test_a_ray_cron_job(job_file: Path) -> None:
    nightly = ("--schedule", "0 2 * * *", "--time-zone", "Europe/Paris")
    dated = ("--set", "output=s3://b/out/$(date -u +%F)", "--set", "sampling.seed=7")
    config_map, job = documents("kuberay", job_file, "--image", "i", *nightly, *dated)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayCronJob")
    assert set(job["spec"]) == {"schedule", "timeZone", "jobTemplate"}
    assert (job["spec"]["schedule"], job["spec"]["timeZone"]) == ("0 2 * * *", "Europe/Paris")
    check_ray_job(job["spec"]["jobTemplate"])
    # What a shell is to fill in is left to each run's; the rest is in the job file.
    entrypoint = job["spec"]["jobTemplate"]["entrypoint"]
    assert entrypoint.endswith('--set "output=s3://b/out/$(date -u +%F)"')
    inside = yaml.safe_load(config_map["data"]["job.yaml"])
    assert (inside["output"], inside["sampling"]["seed"]) == ("s3://b/out", 7)


def test_a_cron_job_that_creates_ray_jobs(job_file: Path) -> None:
    found = documents(
        "kuberay", job_file, "--image", "i", "--schedule", "@daily", "--cron-job", "--memory", "9Gi"
    )
    assert [document["kind"] for document in found] == [
        "ConfigMap", "ConfigMap", "ServiceAccount", "Role", "RoleBinding", "CronJob",
    ]  # fmt: skip
    config_map, template, account, role, binding, cron = found
    created = yaml.safe_load(template["data"]["rayjob.yaml"])
    assert created["kind"] == "RayJob"
    assert created["metadata"] == {"generateName": f"{config_map['metadata']['name']}-"}
    check_ray_job(created["spec"])
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    names = {d["metadata"]["name"] for d in (account, role, binding)}
    assert names == {pod["serviceAccountName"], binding["roleRef"]["name"]}
    assert pod["volumes"][0]["configMap"]["name"] == template["metadata"]["name"]
    assert role["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}
    ]


def test_a_line_for_a_crontab(job_file: Path) -> None:
    result = call(
        "cron", job_file, "-a", "http://10.0.0.1:8265", "--set", "output=s3://b/$(date +%F)"
    )
    assert result.exit_code == 0, result.output
    line = result.stdout
    assert line.startswith("0 2 * * * cd ")
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert re.search(r"(?<!\\)%", line) is None  # cron would end the line there
    command = line.split(" ", 5)[5].replace("\\%", "%")
    assert "submit" in shlex.split(command)
    assert "--wait" in shlex.split(command)
    assert 'output=s3://b/$(date +%F)"' in command
    local = call("cron", job_file, "--schedule", "@weekly").stdout
    assert local.startswith("@weekly cd ")
    assert " run " in local
    for line in (command, local):
        words = shlex.split(line)
        program = words[words.index("flock") + 3]
        assert shutil.which(program, path="/usr/bin:/bin"), "cron's PATH is no more than this"


@pytest.mark.parametrize(
    ("word", "printed"),
    [
        ("output=out/$(echo 5)", "output=out/5"),
        ("a b'c\"d", "a b'c\"d"),
        ("$HOME $(echo 5) `echo 6` \"x\" \\", "$HOME 5 `echo 6` \"x\" \\"),
    ],
)  # fmt: skip
def test_quoting_for_a_shell(word: str, printed: str) -> None:
    result = subprocess.run(
        ["sh", "-c", f"printf %s {quoted(word)}"], capture_output=True, text=True, check=True
    )
    assert result.stdout == printed


@pytest.mark.parametrize("kind", ["cron", "airflow"])
def test_paths_of_this_disk_are_taken_if_the_cluster_has_them(
    job_file: Path, tmp_path: Path, kind: str
) -> None:
    where = ["-a", "http://head:8265", "--set", f"output={tmp_path}/out"]
    refused = call(kind, job_file, *where)
    assert refused.exit_code == 2 and "say --paths-on-cluster" in refused.stderr
    taken = call(kind, job_file, *where, "--paths-on-cluster")
    assert taken.exit_code == 0 and "--wait --paths-on-cluster" in taken.stdout


class Skip(Exception):
    """What BashOperator raises for the codes with which it skips."""


class Fail(Exception):
    """What Airflow does not retry."""


class BashOperator:
    """Airflow's, as far as a DAG uses it."""

    made: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, **settings: Any) -> None:
        self.settings = BashOperator.made["task"] = settings

    def execute(self, context: dict[str, Any]) -> str:
        code = subprocess.run(["bash", "-c", context["command"]]).returncode
        if code in self.settings["skip_on_exit_code"]:
            raise Skip(f"Bash command returned exit code {code}. Skipping.")
        if code:
            raise RuntimeError(f"exit code {code}")
        return "done"


class Dag:
    """Airflow's."""

    def __init__(self, **settings: Any) -> None:
        BashOperator.made["dag"] = settings

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@pytest.fixture
def airflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a DAG imports of Airflow, which is far too large for this environment."""
    parts: dict[str, dict[str, Any]] = {
        "pendulum": {"datetime": lambda *parts, tz: f"{parts} {tz}"},
        "airflow": {},
        "airflow.exceptions": {"AirflowFailException": Fail, "AirflowSkipException": Skip},
        "airflow.sdk": {"DAG": Dag},
        "airflow.providers.standard.operators.bash": {"BashOperator": BashOperator},
    }
    for name, contents in parts.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


def test_an_airflow_dag(job_file: Path, airflow: None) -> None:
    override = "output=s3://b/{{ ds }}/it's"
    result = call("airflow", job_file, "--schedule", "0 2 * * *", "--set", override)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = {}
    exec(compile(result.stdout, "dag.py", "exec"), found)
    dag, task = BashOperator.made["dag"], BashOperator.made["task"]
    assert (dag["dag_id"], dag["schedule"], dag["max_active_runs"]) == ("My_Job.1", "0 2 * * *", 1)
    command = shlex.split(task["bash_command"])
    assert command[:3] == ["specbatch", "run", str(job_file)]
    assert override in command

    # A retry is left to what it can mend.
    operator = found["Specbatch"](**task)
    assert task["retries"] == 2
    assert operator.execute({"command": "exit 0"}) == "done"
    for code in (1, 130):
        with pytest.raises(RuntimeError):
            operator.execute({"command": f"exit {code}"})
    for code in (2, 3, 4):
        with pytest.raises(Fail, match=f"no retry can mend this: .* {code}"):
            operator.execute({"command": f"exit {code}"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kuberay", "--image", "i", "--set", "input.paths=/data/x.parquet"], "input.paths: /data"),
        (["kuberay", "--image", "i", "--set", "models.target=/m/x", "--volume", "c:/d"], "models."),
        (["kuberay", "--image", "i", "--volume", "c"], "--volume c: write it as CLAIM:/PATH"),
        (["kuberay", "--image", "i", "--schedule", "at two"], "--schedule 'at two': write cron's"),
        (["kuberay", "--image", "i", "--cron-job"], "go with --schedule"),
        (["kuberay", "--image", "i", "--set", "outputs=$(date)"], "unknown key"),
        (["cron", "--schedule", "0 2 * * * ; rm"], "--schedule"),
        (["cron", "-a", "http://u:p@head:8265"], "--address: must not hold a user name"),
        (["airflow", "--schedule", "nightly"], "--schedule"),
    ],
)  # fmt: skip
def test_mistakes(job_file: Path, arguments: list[str], message: str) -> None:
    command, *options = arguments
    result = call(command, job_file, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "u:p" not in result.output


def test_names_that_kubernetes_takes() -> None:
    values = {
        "input": {"paths": "x", "prompt_column": "p"},
        "output": "o",
        "models": {"target": "t"},
    }
    values["speculation"] = {"policy": "none"}
    for name in ("a", "9_Lives", "A.-b", "x" * 100, "Ends-" * 8):
        made = kubernetes_name(JobConfig.model_validate({**values, "name": name}))
        assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", made)
        assert len(made) <= 36
    same = "evaluation-of-the-new-summariser-on-"
    one, other = (
        kubernetes_name(JobConfig.model_validate({**values, "name": same + end}))
        for end in ("monday", "tuesday")
    )
    assert one != other
