"""The backend for disks, those of this machine and those that machines share.

**What is atomic, and why.** A file is first written whole to `_specbatch/staging/`, under a random
name, and synced. Then one call of the system gives it its name:

- `put_if_absent`: `link`, which fails if the name is taken. So of several writers one wins. Where a
  filesystem has no hard links, a check and a rename are two steps: of two writers at the same
  instant the later one stays. Callers write one content under one name, so either will do.
- `put`: `rename`, which replaces what is there in one step.
- `replace`: `rename` too, if the file's content still has the version's checksum. A lock on
  `_specbatch/lock` makes writers take turns between check and rename. The system lets go of the
  lock when a writer dies. Where a filesystem has no locks, two writers may both pass the check.

A reader opens the file before or after that call, never a part of it. A writer that is killed
leaves a file in staging, which `clear_staging` removes.

Nothing is tried again here: a disk that fails does not mend itself.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.config.job import S3Config
from pipeline.layout import LOCK, STAGING
from pipeline.storage.patience import RESUME, explained
from pipeline.storage.search import Entry, Found, Stamp, search

_NOWHERE = Stamp(0, 0)
"""What is known of a file that a link leads to and that is not there."""

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}
_WORDS = {
    errno.ENOSPC: f"no space left on this disk; free some; {RESUME}",
    errno.EDQUOT: f"the disk quota is used up; free some space or raise it; {RESUME}",
    errno.EFBIG: (
        "the file is larger than this file system or `ulimit -f` allows; raise the limit; " + RESUME
    ),
    errno.EROFS: f"this file system is read-only; mount it writable; {RESUME}",
    errno.EIO: f"the disk answered with an input/output error; check it; {RESUME}",
    errno.EACCES: "permission denied; check who owns the folder",
    errno.EPERM: "permission denied; check who owns the folder",
    errno.ENOTDIR: "part of this path is a file, not a folder",
    errno.ENAMETOOLONG: "a name in this path is too long for the file system; shorten it",
}
"""What is said of an error of the system, by its number."""


@dataclass(frozen=True)
class LocalFolder:
    """A folder on a disk. See `Folder` for what its methods do.

    Attributes:
        url: its path.
        s3: how the job's files on S3 are reached, if it has some.
    """

    url: str
    s3: S3Config

    def join(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    def subfolder(self, name: str) -> LocalFolder:
        return LocalFolder(self.join(name), self.s3)

    # ------------------------------------------------------------------------- write

    def put_if_absent(self, name: str, data: bytes) -> bool:
        with self._explained(name):
            target = Path(self.url, name)
            if target.exists():
                return False
            with self._staged(target, data) as staged:
                return _link(staged, target)

    def put(self, name: str, data: bytes) -> None:
        with self._explained(name):
            target = Path(self.url, name)
            with self._staged(target, data) as staged:
                os.replace(staged, target)

    def replace(self, name: str, data: bytes, version: str) -> bool:
        with self._explained(name):
            target = Path(self.url, name)
            with self._staged(target, data) as staged, self._locked():
                if not target.exists() or self.read_version(name)[1] != version:
                    return False
                os.replace(staged, target)
        return True

    def put_folder(self, name: str, files: Mapping[str, bytes]) -> None:
        with self._explained(name):
            target, staged = Path(self.url, name), self._staging(name)
            shutil.rmtree(target, ignore_errors=True)
            if not files:
                return
            staged.mkdir(parents=True)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                for each, data in files.items():
                    _write_synced(staged / each, data)
                os.replace(staged, target)
            finally:
                shutil.rmtree(staged, ignore_errors=True)

    def upload(self, name: str, file: Path) -> None:
        with self._explained(name):
            target = Path(self.url, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            # Beside its target: in this folder nobody would look for, or clear, a staging folder.
            staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            try:
                shutil.copyfile(file, staged)
                with staged.open("rb") as copied:
                    os.fsync(copied.fileno())
                os.replace(staged, target)
            finally:
                staged.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        with self._explained(name):
            Path(self.url, name).unlink(missing_ok=True)

    def clear_staging(self) -> None:
        shutil.rmtree(Path(self.url, STAGING), ignore_errors=True)

    # -------------------------------------------------------------------------- read

    def read(self, name: str) -> bytes | None:
        try:
            return self._content(name)
        except FileNotFoundError:
            return None

    def read_version(self, name: str) -> tuple[bytes, str]:
        data = self._content(name)
        return data, hashlib.sha256(data).hexdigest()

    @contextmanager
    def open(self, name: str, size: int | None = None) -> Iterator[pa.NativeFile]:
        with (
            self._explained(name),
            pafs.LocalFileSystem().open_input_file(self._path(name)) as file,
        ):
            yield file

    def stamp(self, name: str) -> Stamp | None:
        with self._explained(name):
            return _Disk().stamp(self._path(name))

    def list(self, name: str) -> dict[str, int]:
        return self._files(name, deep=False)

    def tree(self, name: str) -> dict[str, int]:
        return self._files(name, deep=True)

    def folders(self) -> tuple[str, ...]:
        with self._explained(""):
            paths = [e.path for e in _Disk().list(self._path(""), deep=False) if e.stamp is None]
        return tuple(sorted(os.path.basename(path[:-1]) for path in paths))

    def _files(self, name: str, *, deep: bool) -> dict[str, int]:
        base = self._path(name)
        with self._explained(name):
            return {
                os.path.relpath(path, base): stamp.size
                for path, stamp in _Disk().list(base, deep=deep)
                if stamp is not None
            }

    def _content(self, name: str) -> bytes:
        with self._explained(name):
            return Path(self.url, name).read_bytes()

    # ---------------------------------------------------------------- how it is done

    def _explained(self, name: str) -> AbstractContextManager[None]:
        return explained(self.join(name), _in_words)

    def _path(self, name: str) -> str:
        return os.path.abspath(Path(self.url, name))

    def _staging(self, name: str) -> Path:
        """A name in the staging folder that nobody else uses."""
        return Path(self.url, STAGING, f"{uuid.uuid4().hex}-{Path(name).name}")

    @contextmanager
    def _staged(self, target: Path, data: bytes) -> Iterator[Path]:
        """A complete, synced copy of `data` on the target's own filesystem."""
        staged = self._staging(target.name)
        staged.parent.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_synced(staged, data)
            yield staged
        finally:
            staged.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all writers of this folder; a writer that dies lets go of it."""
        with Path(self.url, LOCK).open("ab") as lock:
            # A filesystem without locks (some network ones): as good as it gets without.
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def find_files(pattern: str) -> Found:
    """What a path names. See `pipeline.storage.folder.find_files`."""
    with explained(pattern, _in_words):
        return search(_Disk(), os.path.abspath(pattern), lambda path: path)


class _Disk:
    """Absolute paths of this machine as a tree, for `search`."""

    def stamp(self, path: str) -> Stamp | None:
        return _stamp(path)

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def list(self, folder: str, *, deep: bool) -> Iterator[Entry]:
        # Links may lead to a folder again, or around: each is listed once, under its own name.
        folders, links, seen = [folder.rstrip("/") or "/"], list[str](), set[str]()
        while folders or links:
            path = (folders or links).pop()
            real = os.path.realpath(path)
            if real in seen:
                continue
            seen.add(real)
            for each in _entries(path):
                if each.is_dir():
                    yield Entry(f"{each.path}/", None)
                    if deep:
                        (links if each.is_symlink() else folders).append(each.path)
                elif (stamp := _stamp(each.path)) is not None:
                    yield Entry(each.path, stamp)
                elif each.is_symlink():
                    yield Entry(each.path, _NOWHERE)  # who reads it finds out


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What is directly in a folder; nothing if there is none."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _stamp(path: str) -> Stamp | None:
    """Of a file; None if there is none, or no more."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Stamp(found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _link(staged: Path, target: Path) -> bool:
    """Give the staged file its name unless the name is taken. True if it was free."""
    try:
        os.link(staged, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # A filesystem without hard links: the check and the rename are two steps, so of two
        # writers at the same instant the later one stays. Both hold the same unit.
        if target.exists():
            return False
        os.rename(staged, target)
    return True


def _in_words(error: BaseException) -> str | None:
    """What happened and the fix; None if the error is not one of a disk."""
    return _WORDS.get(error.errno or 0) if isinstance(error, OSError) else None
