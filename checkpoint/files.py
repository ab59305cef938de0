"""Files of a checkpoint: on the disk once they are written, with size and SHA-256; plain ones when read."""

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, Field

from openmoe.checkpoint.course import Course
from openmoe.checkpoint.errors import CheckpointError

# What is hashed and written between two looks at whether to go on. Both let other threads run meanwhile.
CHUNK_BYTES = 4 * 2**20


class FileEntry(BaseModel, strict=True, extra="forbid", frozen=True):
    """One file of the checkpoint."""

    size_bytes: int = Field(ge=0)
    sha256: str


def write_file(path: Path, buffers: Iterable[memoryview | bytes], course: Course | None = None) -> FileEntry:
    """Writes a new file from buffers of bytes, synced to the disk.

    Raises OSError, naming the file, and SaveCancelled.
    """
    course = course or Course()
    digest, size_bytes = hashlib.sha256(), 0
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for buffer in buffers:
                for start in range(0, len(buffer), CHUNK_BYTES):
                    course.go_on(f"writing {path.name}")
                    chunk = memoryview(buffer)[start : start + CHUNK_BYTES]
                    digest.update(chunk)
                    size_bytes += len(chunk)
                    while chunk:  # a disk that fills up takes a part first and complains about the rest
                        chunk = chunk[os.write(descriptor, chunk) :]
            course.go_on(f"syncing {path.name}")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return FileEntry(size_bytes=size_bytes, sha256=digest.hexdigest())


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fault_in_file(path: Path, stated: FileEntry) -> str | None:
    """What is wrong with a file that should be as `stated`; None where nothing is."""
    try:
        size_bytes = require_plain(path)
        if size_bytes != stated.size_bytes:
            return f"damaged: {size_bytes} bytes, the manifest states {stated.size_bytes}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != stated.sha256:
                return "damaged: its SHA-256 differs from the manifest's"
    except CheckpointError as error:
        return str(error).removeprefix(f"{path}: ")
    except OSError as error:
        return f"can't be read: {error.strerror}"
    return None


def require_plain(path: Path) -> int:
    """The size of a plain file in bytes. A link may show something else tomorrow, a pipe never ends.

    Raises CheckpointError for anything else, OSError where it can't be seen.
    """
    status = os.lstat(path)
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder"}
    kind = kinds.get(stat.S_IFMT(status.st_mode), "no plain file")
    raise CheckpointError(f"{path}: is {kind}; a checkpoint has plain files only")
