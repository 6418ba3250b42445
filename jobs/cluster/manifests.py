"""A job as what schedulers read: KubeRay and Kubernetes manifests, and a crontab line.

Fields are those of KubeRay's v1 types (rayjob_types.go, raycronjob_types.go, raycluster_types.go).
Manifests are plain data until they are dumped, and hold no secret: pods get theirs from Kubernetes
Secrets by name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from jobs.cluster.ray_job import STOP_VARIABLE
from pipeline.config.job import ActorsConfig, JobConfig
from pipeline.errors import UserError

_FOLDER, _FILE = "/etc/specbatch", "job.yaml"
"""Where every pod finds the job file, or the recipe."""

_LONGEST_NAME = 36
"""Characters. KubeRay refuses names of RayJobs above 47, and a schedule adds some to its own."""

_KEPT_SECONDS = 600
"""How long KubeRay keeps a RayJob that is over, for its logs."""

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Volume:
    """A persistent volume claim and where pods mount it."""

    claim: str
    mount: str


@dataclass(frozen=True)
class Pods:
    """What the pods of a job's Ray cluster are like.

    Attributes:
        image: has specbatch and its models, or reaches them.
        secrets: Secrets whose keys become environment variables.
        volumes: what is mounted into every pod.
        memory, head_memory: of a worker and of the head, such as 32Gi.
        service_account: whose role on AWS or GCP the pods have.
        token_authentication: let KubeRay make a token and ask for it.
        retries: how often a job that fails gets a new cluster, on which it resumes.
        stop_seconds: how long units in flight may take when the job is stopped.
        overrides: of the job file, for the shell of each run: output=s3://b/out/$(date +%F).
        recipe: text of the recipe of nightly datasets that is run instead of the job.
    """

    image: str
    secrets: tuple[str, ...] = ()
    volumes: tuple[Volume, ...] = ()
    memory: str = "16Gi"
    head_memory: str = "8Gi"
    service_account: str | None = None
    token_authentication: bool = False
    retries: int = 2
    stop_seconds: int = 3600
    overrides: tuple[str, ...] = ()
    recipe: str | None = None


def kubernetes_name(job: JobConfig) -> str:
    """The job's name as Kubernetes takes it: lower case, digits and hyphens, a letter first.

    One that is too long ends in a hash of the whole, so that jobs of one beginning stay apart.
    """
    name = _plain_name(job.name)
    name = name if name[:1].isalpha() else f"job-{name}"
    if len(name) <= _LONGEST_NAME:
        return name
    mark = _mark(job.name)
    return f"{name[: _LONGEST_NAME - len(mark) - 1].rstrip('-')}-{mark}"


def parse_volume(text: str) -> Volume:
    """A volume from CLAIM:/PATH.

    Raises:
        UserError: it is written otherwise.
    """
    claim, _, mount = text.partition(":")
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", claim) or not mount.startswith("/"):
        raise UserError(f"--volume {text}: write it as CLAIM:/PATH, such as prompts:/data")
    return Volume(claim, mount.rstrip("/") or "/")


def check_paths(job: JobConfig, volumes: Sequence[Volume]) -> None:
    """Refuse local paths that no pod has.

    Raises:
        UserError: names the path and what to do.
    """
    fields = [("input.paths", path) for path in job.input.paths]
    fields += [("output", job.output), ("models.target", job.models.target)]
    fields += [
        ("models.draft", job.models.draft or ""),
        ("speculation.head", job.speculation.head or ""),
    ]
    for field, path in fields:
        if not path or not path.startswith("/"):  # s3://, a hub name, pkg:
            continue
        if not any(PurePosixPath(path).is_relative_to(v.mount) for v in volumes):
            raise UserError(
                f"{field}: {path} is on no volume of the pods; use s3://, or mount the claim that "
                "holds it, such as --volume CLAIM:/data, and write the path as pods see it"
            )


def ray_job(job: JobConfig, pods: Pods) -> list[Manifest]:
    """A RayJob that runs the job once on a Ray cluster of its own, and its ConfigMap."""
    name = kubernetes_name(job)
    return [
        _config_map(job, pods, name),
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "metadata": {"name": name},
            "spec": _ray_job_spec(job, pods, name),
        },
    ]


def ray_cron_job(
    job: JobConfig, pods: Pods, schedule: str, time_zone: str | None
) -> list[Manifest]:
    """A RayCronJob that makes a RayJob at each time of the schedule, and its ConfigMap."""
    name = kubernetes_name(job)
    spec: Manifest = {"schedule": schedule, "jobTemplate": _ray_job_spec(job, pods, name)}
    if time_zone:
        spec["timeZone"] = time_zone
    return [
        _config_map(job, pods, name),
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayCronJob",
            "metadata": {"name": name},
            "spec": spec,
        },
    ]


def cron_job(
    job: JobConfig, pods: Pods, schedule: str, time_zone: str | None, kubectl: str
) -> list[Manifest]:
    """A CronJob that creates the RayJob, for a KubeRay whose RayCronJob is not enabled.

    Args:
        job: the job.
        pods: those of its Ray cluster.
        schedule: in cron's form.
        time_zone: of the schedule, by its IANA name.
        kubectl: an image that has kubectl.
    """
    name = kubernetes_name(job)
    template, creator = f"{name}-rayjob", f"{name}-creator"
    resource = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"generateName": f"{name}-"},
        "spec": _ray_job_spec(job, pods, name),
    }
    pod = {
        "serviceAccountName": creator,
        "restartPolicy": "Never",
        "containers": [
            {
                "name": "create",
                "image": kubectl,
                "command": ["kubectl", "create", "-f", "/manifests/rayjob.yaml"],
                "volumeMounts": [{"name": "manifests", "mountPath": "/manifests"}],
            }
        ],
        "volumes": [{"name": "manifests", "configMap": {"name": template}}],
    }
    spec: Manifest = {
        "schedule": schedule,
        "concurrencyPolicy": "Forbid",
        "jobTemplate": {"spec": {"backoffLimit": 2, "template": {"spec": pod}}},
    }
    if time_zone:
        spec["timeZone"] = time_zone
    rule = {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": creator}
    rbac = "rbac.authorization.k8s.io/v1"
    return [
        _config_map(job, pods, name),
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": template},
            "data": {"rayjob.yaml": dump([resource])},
        },
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": creator}},
        {"apiVersion": rbac, "kind": "Role", "metadata": {"name": creator}, "rules": [rule]},
        {
            "apiVersion": rbac,
            "kind": "RoleBinding",
            "metadata": {"name": creator},
            "roleRef": role,
            "subjects": [{"kind": "ServiceAccount", "name": creator}],
        },
        {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": name}, "spec": spec},
    ]


def _config_map(job: JobConfig, pods: Pods, name: str) -> Manifest:
    text = pods.recipe or dump([job.model_dump(mode="json", exclude_unset=True)])
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {_FILE: text},
    }


def _ray_job_spec(job: JobConfig, pods: Pods, config_map: str) -> Manifest:
    # KubeRay retries all that fails, whatever its exit code.
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(pods.stop_seconds), STOP_VARIABLE: "1"}
    runtime_env = {"env_vars": variables}
    changes = "".join(f" --set {quoted(override)}" for override in pods.overrides)
    command = "run" if pods.recipe is None else "nightly"
    return {
        "entrypoint": f"specbatch {command} {_FOLDER}/{_FILE}{changes}",
        "submissionMode": "K8sJobMode",
        "backoffLimit": pods.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": _KEPT_SECONDS,
        "runtimeEnvYAML": yaml.safe_dump(runtime_env),
        "rayClusterSpec": _ray_cluster(job, pods, config_map),
    }


def _ray_cluster(job: JobConfig, pods: Pods, config_map: str) -> Manifest:
    """A head without actors, and a group of workers for each group of actors, one actor in each."""
    head = {"cpu": "2", "memory": pods.head_memory}
    pools = job.actors.pools
    cluster: Manifest = {
        "rayVersion": importlib.metadata.version("ray"),
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},
            "template": _template("ray-head", pods, config_map, head),
        },
        "workerGroupSpecs": [
            _workers(name, group, pods, config_map)
            for name, group in zip(_group_names(pools), pools.values(), strict=True)
        ],
    }
    if job.actors.max_actors > job.actors.min_actors:
        cluster["enableInTreeAutoscaling"] = True
    if pods.token_authentication:
        cluster["authOptions"] = {"mode": "token"}
    return cluster


def _group_names(names: Iterable[str]) -> list[str]:
    """What KubeRay calls the groups. Two that it would not tell apart have a mark."""
    short = {name: _plain_name(name) or "actors" for name in names}
    shared = Counter(short.values())
    return [each if shared[each] == 1 else f"{each}-{_mark(name)}" for name, each in short.items()]


def _plain_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _mark(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _workers(name: str, group: ActorsConfig, pods: Pods, config_map: str) -> Manifest:
    resources = {"cpu": str(math.ceil(group.cores)), "memory": pods.memory}
    if group.num_gpus:
        resources["nvidia.com/gpu"] = str(math.ceil(group.num_gpus))
    return {
        "groupName": name,
        "replicas": group.min,
        "minReplicas": group.min,
        "maxReplicas": group.max or group.min,
        "rayStartParams": {},
        "template": _template("ray-worker", pods, config_map, resources),
    }


def _template(container: str, pods: Pods, config_map: str, resources: Manifest) -> Manifest:
    """A pod of one container, with the job file, the Secrets and the volumes."""
    mounts = [{"name": "job", "mountPath": _FOLDER, "readOnly": True}]
    volumes: list[Manifest] = [{"name": "job", "configMap": {"name": config_map}}]
    for i, volume in enumerate(pods.volumes):
        mounts.append({"name": f"volume-{i}", "mountPath": volume.mount})
        claim = {"claimName": volume.claim}
        volumes.append({"name": f"volume-{i}", "persistentVolumeClaim": claim})
    spec: Manifest = {
        "containers": [
            {
                "name": container,
                "image": pods.image,
                "resources": {"limits": resources, "requests": dict(resources)},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    if pods.secrets:
        found = [{"secretRef": {"name": name}} for name in pods.secrets]
        spec["containers"][0]["envFrom"] = found
    if pods.service_account:
        spec["serviceAccountName"] = pods.service_account
    return {"spec": spec}


class _Plain(yaml.SafeDumper):
    """Texts of several lines as blocks, and no anchors: manifests are read by people."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Plain.add_representer(str, _text)


def dump(documents: Sequence[Manifest]) -> str:
    """The documents as one YAML file."""
    text = yaml.dump_all(
        documents, Dumper=_Plain, sort_keys=False, allow_unicode=True, explicit_start=False
    )
    return str(text)


# --------------------------------------------------------------- cron


def program() -> list[str]:
    """How cron, whose PATH has no virtual environment, calls the specbatch that runs now."""
    beside = Path(sys.executable).with_name("specbatch")
    return [str(beside)] if beside.is_file() else [sys.executable, "-m", "jobs.cli"]


def crontab_line(command: Sequence[str], schedule: str, folder: Path, lock: Path, log: Path) -> str:
    """A line of a crontab that runs a command unless the last time's is still at it."""
    words = " ".join(quoted(word) for word in command)
    line = (
        f"cd {shlex.quote(str(folder))} && flock -n {shlex.quote(str(lock))} {words} "
        f">> {shlex.quote(str(log))} 2>&1"
    )
    return f"{schedule} {line.replace('%', chr(92) + '%')}\n"  # to cron, % ends the line


def left_to_shell(word: str) -> bool:
    """Whether a shell is to substitute a command in it, as in output=out/$(date +%F)."""
    return re.search(r"\$\([^()'\"`]*\)", word) is not None


def quoted(word: str) -> str:
    """Quoted for a shell, all but the commands that it is to substitute."""
    if not left_to_shell(word):
        return shlex.quote(word)
    escaped = re.sub(r'(["`\\]|\$(?!\())', r"\\\1", word)
    return f'"{escaped}"'
