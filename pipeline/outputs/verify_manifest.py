"""What the manifest says of a finished job's files, and whether that is so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import layout
from pipeline.config.model_identity import digest
from pipeline.outputs.problems import Problem, Verification, first_line
from pipeline.storage.folder import Folder


@dataclass(frozen=True)
class ListedFiles:
    """What the manifest says.

    Attributes:
        values: the manifest; empty if there is none.
        files: rows and checksum by name.
    """

    values: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]

    @staticmethod
    def read(output: Folder, found: Verification) -> ListedFiles:
        """The manifest of a finished job; nothing if the job is not finished."""
        data = output.read(layout.MANIFEST) if found.finished else None
        if data is None:
            if found.finished:
                text = f"not there, but {layout.SUCCESS} is"
                found.add([Problem("manifest", layout.MANIFEST, text)])
            return ListedFiles({}, {})
        try:
            values = json.loads(data)
            entries = [e for kind in ("files", "history", "stats") for e in values.get(kind, [])]
            files = {entry["name"]: (entry["rows"], entry["sha256"]) for entry in entries}
            return ListedFiles(values, files)
        except (ValueError, KeyError, TypeError) as error:
            found.add([Problem("unreadable", layout.MANIFEST, first_line(error))])
            return ListedFiles({}, {})

    def differs(self, name: str, sha256: str, rows: int) -> Problem | None:
        """What is wrong with a file according to the manifest; `rows` below 0: not known."""
        if not self.values:
            return None
        if name not in self.files:
            return Problem("manifest", name, "not in the manifest")
        listed_rows, listed_sha256 = self.files[name]
        if listed_sha256 != sha256:
            return Problem("checksum", name, "its checksum is not the one in the manifest")
        if rows >= 0 and listed_rows != rows:
            return Problem("manifest", name, f"{rows} rows, the manifest says {listed_rows}")
        return None


def check_manifest(
    output: Folder,
    listed: ListedFiles,
    job: Mapping[str, Any],
    read: set[str],
    found: Verification,
) -> None:
    """Check the manifest's own claims.

    Args:
        output: the folder.
        listed: the manifest.
        job: what `_specbatch/job.json` says.
        read: names of the files that units named, which are checked already.
        found: what was counted; problems are added.
    """
    if not listed.values:
        return
    for name in sorted(listed.files.keys() - read):
        data = output.read(name)
        if data is None:
            found.add([Problem("missing", name, "not there, but in the manifest")])
        elif name.startswith(f"{layout.STATS}/"):
            problem = listed.differs(name, hashlib.sha256(data).hexdigest(), -1)
            found.add([problem] if problem else [])
            found.files, found.bytes = found.files + 1, found.bytes + len(data)
    if listed.values.get("fingerprint") != digest(job.get("fingerprint", {})):
        text = f"is of another job than {layout.JOB}"
        found.add([Problem("manifest", layout.MANIFEST, text)])
    for key in ("rows_in", "rows_out", "rows_in_errors"):
        if listed.values.get(key) != getattr(found, key):
            text = f"{key} is {listed.values.get(key)}, the files have {getattr(found, key)}"
            found.add([Problem("manifest", layout.MANIFEST, text)])
