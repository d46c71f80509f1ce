"""Where bytes lie: a blob per SHA-256, on a local folder or anything fsspec opens.

Why write, verify, rename: a name in here promises its content. A blob gets its name only after its bytes were read
back from the store and hashed, so a kill or a bad disk leaves a temporary file, never a wrong blob.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from loramux.errors import LoramuxError, require
from loramux.registry.errors import Corrupt, RegistryError, StorageError, Vanished

CHUNK = 1 << 20
MARK = "registry"  # a file that names the registry whose blobs lie here
_SHA = re.compile(r"[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class Blobs(Protocol):
    """A store of immutable blobs; every method may raise StorageError."""

    def put(self, source: Path, sha256: str) -> bool:
        """Store the bytes of `source`; False where they were there already (and are whole)."""

    def fetch(self, sha256: str, target: Path) -> int:
        """Copy a blob to a new file, verified; returns its length. Raises Corrupt."""

    def size(self, sha256: str) -> int | None:
        """Its length, or None where there is no such blob."""

    def is_whole(self, sha256: str) -> bool:
        """Reads every byte."""

    def delete(self, sha256: str) -> None:
        """Missing is fine."""

    def walk(self) -> Iterator[str]:
        """SHA-256 of every blob, in order."""

    def temporary(self, older_than_s: float) -> Iterator[str]:
        """Names of unfinished writes that nobody can still be working on."""

    def discard(self, name: str) -> None:
        """Remove an unfinished write."""

    def mark(self) -> str | None:
        """Which registry these blobs belong to; None where nothing says so."""

    def set_mark(self, owner: str) -> None:
        """Say so; the first one stays."""


def open_blobs(where: str | os.PathLike[str]) -> Blobs:
    """A folder, or a URL such as s3://bucket/prefix or memory://name."""
    text = os.fspath(where)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" not in text:
        return LocalBlobs(Path(text))
    return RemoteBlobs(text)


class LocalBlobs:
    """Blobs in `root/ab/abcd...`, unfinished writes in `root/tmp`; both on one file system."""

    def __init__(self, root: Path):
        self.root = root
        self.tmp = root / "tmp"

    def path(self, sha256: str) -> Path:
        return self.root / _checked(sha256)[:2] / sha256

    def put(self, source: Path, sha256: str) -> bool:
        target = self.path(sha256)
        if self.is_whole(sha256):
            return False
        with storing():
            self.tmp.mkdir(parents=True, exist_ok=True)
            part = self.tmp / f"{sha256[:16]}-{secrets.token_hex(8)}"
            try:
                copy_hashed(source, part, sha256, sync=True)
                _verify(part, sha256)
                _make_folder(target.parent)
                os.replace(part, target)
                sync_folder(target.parent)
            except FileNotFoundError:
                if source.exists():
                    raise Vanished from None
                raise
            finally:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)
        return True

    def fetch(self, sha256: str, target: Path) -> int:
        source = self.path(sha256)
        if not source.is_file():
            raise _gone(sha256)
        with storing():
            return copy_hashed(source, target, sha256, sync=False)

    def size(self, sha256: str) -> int | None:
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(error) from None

    def is_whole(self, sha256: str) -> bool:
        path = self.path(sha256)
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == sha256
        except OSError:  # missing, or a disk that cannot read it
            return False

    def delete(self, sha256: str) -> None:
        with storing():
            self.path(sha256).unlink(missing_ok=True)

    def walk(self) -> Iterator[str]:
        if not self.root.is_dir():
            return
        with storing():
            folders = sorted(self.root.iterdir())
        for folder in folders:
            if len(folder.name) == 2 and folder.is_dir():
                with storing():
                    names = sorted(p.name for p in folder.iterdir() if _SHA.fullmatch(p.name))
                yield from names

    def temporary(self, older_than_s: float) -> Iterator[str]:
        if not self.tmp.is_dir():
            return
        for path in sorted(self.tmp.iterdir()):
            with contextlib.suppress(FileNotFoundError):  # its writer has just finished
                if time.time() - path.stat().st_mtime >= older_than_s:
                    yield path.name

    def discard(self, name: str) -> None:
        with storing():
            (self.tmp / Path(name).name).unlink(missing_ok=True)

    def mark(self) -> str | None:
        try:
            return (self.root / MARK).read_text(encoding="ascii", errors="replace")[:64]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(error) from None

    def set_mark(self, owner: str) -> None:
        with storing():
            self.tmp.mkdir(parents=True, exist_ok=True)
            part = self.tmp / f"{MARK}-{secrets.token_hex(8)}"
            with part.open("w", encoding="ascii") as file:
                file.write(owner)
                file.flush()
                os.fsync(file.fileno())  # an empty mark would be another registry's
            try:
                os.link(part, self.root / MARK)
                sync_folder(self.root)
            except FileExistsError:
                pass
            finally:
                part.unlink()


class RemoteBlobs:
    """The same on an fsspec file system. Verifying reads everything back: an upload is trusted as little as a disk."""

    def __init__(self, url: str):
        fsspec: Any = require("fsspec", "registry", "a blob store behind a URL")
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise RegistryError(
                f"no blob store behind {url.split('://')[0]!r:.40} URLs: {error}", code="bad_url"
            ) from None
        self.root = self.root.rstrip("/")

    def path(self, sha256: str) -> str:
        return f"{self.root}/{_checked(sha256)[:2]}/{sha256}"

    def put(self, source: Path, sha256: str) -> bool:
        if self.is_whole(sha256):
            return False
        target = self.path(sha256)
        part = f"{self.root}/tmp/{int(time.time())}-{secrets.token_hex(8)}"
        with reaching():
            self.fs.makedirs(f"{self.root}/tmp", exist_ok=True)
            self.fs.makedirs(f"{self.root}/{sha256[:2]}", exist_ok=True)
            try:
                self.fs.put_file(str(source), part)
                if self._hash(part) != sha256:
                    raise _changed(sha256)
                self.fs.mv(part, target)
            except FileNotFoundError:
                if source.exists():
                    raise Vanished from None
                raise
            finally:
                with contextlib.suppress(Exception):  # what stays behind is known by its age
                    if self.fs.exists(part):
                        self.fs.rm_file(part)
        return True

    def fetch(self, sha256: str, target: Path) -> int:
        state = hashlib.sha256()
        with reaching():
            try:
                with self.fs.open(self.path(sha256), "rb") as source, target.open("xb") as sink:
                    while block := source.read(CHUNK):
                        state.update(block)
                        sink.write(block)
                    length = sink.tell()
            except FileNotFoundError:
                raise _gone(sha256) from None
        if state.hexdigest() != sha256:
            target.unlink()
            raise _changed(sha256)
        return length

    def size(self, sha256: str) -> int | None:
        with reaching():
            try:
                return int(self.fs.size(self.path(sha256)))
            except FileNotFoundError:
                return None

    def is_whole(self, sha256: str) -> bool:
        with reaching():
            try:
                return self._hash(self.path(sha256)) == sha256
            except FileNotFoundError:
                return False

    def delete(self, sha256: str) -> None:
        with reaching(), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(sha256))

    def walk(self) -> Iterator[str]:
        with reaching():
            self.fs.invalidate_cache()
            found = self.fs.find(self.root) if self.fs.exists(self.root) else []
        names = (str(path).rsplit("/", 1)[-1] for path in found)
        yield from sorted(name for name in names if _SHA.fullmatch(name))

    def temporary(self, older_than_s: float) -> Iterator[str]:
        with reaching():
            self.fs.invalidate_cache()
            folder = f"{self.root}/tmp"
            found = self.fs.find(folder) if self.fs.exists(folder) else []
        for name in sorted(str(path).rsplit("/", 1)[-1] for path in found):
            started = name.split("-")[0]
            if started.isdigit() and time.time() - int(started) >= older_than_s:
                yield name

    def discard(self, name: str) -> None:
        with reaching(), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(f"{self.root}/tmp/{Path(name).name}")

    def mark(self) -> str | None:
        with reaching():
            try:
                found: bytes = self.fs.cat_file(f"{self.root}/{MARK}")
            except FileNotFoundError:
                return None
            return found[:64].decode("ascii", "replace")

    def set_mark(self, owner: str) -> None:
        with reaching():
            self.fs.makedirs(self.root, exist_ok=True)
            self.fs.pipe_file(f"{self.root}/{MARK}", owner.encode("ascii"))

    def _hash(self, path: str) -> str:
        state = hashlib.sha256()
        with self.fs.open(path, "rb") as file:
            while block := file.read(CHUNK):
                state.update(block)
        return state.hexdigest()


def copy_hashed(source: Path, target: Path, sha256: str, *, sync: bool) -> int:
    """Copy to a new read-only file; refuses bytes that are not what `sha256` says."""
    state, length = hashlib.sha256(), 0
    with source.open("rb") as read, target.open("xb") as write:
        while block := read.read(CHUNK):
            state.update(block)
            length += len(block)
            write.write(block)
        write.flush()
        if sync:
            os.fsync(write.fileno())
        os.fchmod(write.fileno(), 0o444)
    if state.hexdigest() != sha256:
        target.unlink()
        raise _changed(sha256)
    return length


def sync_folder(folder: Path) -> None:
    """A rename survives a power cut only when its folder is on the disk too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def storing() -> Iterator[None]:
    """The system's errors as one clear error without a path."""
    try:
        yield
    except OSError as error:
        raise storage_error(error) from error


@contextlib.contextmanager
def reaching() -> Iterator[None]:
    """The same for a store behind a URL, whose errors are of its client's own kinds."""
    try:
        with storing():
            yield
    except LoramuxError:
        raise
    except Exception as error:
        raise StorageError(
            f"the registry's blob store failed ({type(error).__name__}); nothing was changed, repeat when it works "
            "again"
        ) from error


def storage_error(error: OSError) -> StorageError:
    if error.errno in _FULL:
        return StorageError(
            "the registry's disk is full; nothing was changed, free some space and repeat",
            code="storage_full",
        )
    if error.errno in _READ_ONLY:
        return StorageError(
            "the registry's storage may not be written; nothing was changed, "
            "check its owner and that it is not mounted read-only, then repeat",
            code="storage_read_only",
        )
    why = error.strerror or type(error).__name__
    return StorageError(
        f"the registry's storage failed ({why}); nothing was changed, repeat when it works again"
    )


def _verify(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise _changed(sha256)


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)


def _checked(sha256: str) -> str:
    if not _SHA.fullmatch(sha256):
        raise RegistryError(f"{sha256!r:.80} is not a SHA-256 in lower-case hex", code="bad_digest")
    return sha256


def _gone(sha256: str) -> Corrupt:
    return Corrupt(f"the bytes of blob {sha256[:12]} are missing; run 'loramux registry fsck'")


def _changed(sha256: str) -> Corrupt:
    return Corrupt(
        f"the bytes of blob {sha256[:12]} are not what was checked; check the disk and repeat, "
        "'loramux registry fsck' finds every such blob"
    )
