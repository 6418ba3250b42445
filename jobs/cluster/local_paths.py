"""Which paths of a job only this machine can have, when a cluster elsewhere is to run it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from pipeline.config.job import JobConfig
from pipeline.errors import UserError
from pipeline.storage.folder import is_local

_GLOB = set("*?[")
"""Characters by which a part of a path is a pattern."""

_NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "gpfs", "beegfs", "gluster", "afs")
"""Parts of the names of file systems that machines share; FUSE ones count, too."""

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
"""Hosts behind which a tunnel to another machine may begin."""


def refuse_local_paths(job: JobConfig, address: str) -> None:
    """Refuse paths on this machine's own disk if the cluster is another machine.

    A path that does not exist here is taken to exist there, and so is any path if the address is
    this machine's, behind which there may be a tunnel; then the job itself says what is missing.

    Raises:
        UserError: names the path and what to do.
    """
    host = urlsplit(address).hostname or ""
    if host in _LOOPBACK or host in own_addresses():
        return
    for field, path in _local_paths(job):
        found = _existing(path, may_be_new=field == "output")
        if found is not None and not _on_network(found):
            raise UserError(
                f"{field}: {path} is on this machine's own disk, which {address} does not see; "
                "use s3:// or a disk that all of its nodes mount, or say --paths-on-cluster if "
                "the same path exists there"
            )


def own_addresses() -> set[str]:
    """Names and addresses of this machine."""
    own = {socket.gethostname(), socket.getfqdn()}
    for addresses in psutil.net_if_addrs().values():
        own |= {a.address for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)}
    return own


def _local_paths(job: JobConfig) -> Iterator[tuple[str, str]]:
    """The job's absolute local paths, each with its field."""
    fields = [("input.paths", path) for path in job.input.paths]
    fields += [("models.target", job.models.target), ("models.draft", job.models.draft or "")]
    fields += [("speculation.head", job.speculation.head or ""), ("output", job.output)]
    fields += [("speculation.corpus", path) for path in job.speculation.corpus]
    for field, path in fields:
        if is_local(path) and Path(path).is_absolute():
            yield field, path


def _existing(path: str, *, may_be_new: bool) -> Path | None:
    """The part of a path that exists here, if that says something; None if it does not."""
    parts = Path(path).parts
    glob = next((i for i, part in enumerate(parts) if _GLOB & set(part)), len(parts))
    plain = Path(*parts[:glob])
    if plain.exists():
        return plain
    if may_be_new:
        # A folder of a user's or project's, not just / or /mnt.
        return next((p for p in plain.parents if p.exists() and len(p.parts) > 2), None)
    return None


def _on_network(path: Path) -> bool:
    """Whether the filesystem of `path` is one that machines share."""
    resolved = path.resolve()
    mounts = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    here = next((p for p in (resolved, *resolved.parents) if p in mounts), None)
    kind = mounts[here].lower() if here is not None else ""
    return kind.startswith("fuse.") or any(name in kind for name in _NETWORK)
