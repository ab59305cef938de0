"""Results on disk that are either whole or absent."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from openmoe.data.errors import DataError
from openmoe.data.shards import sync_path


def cache_folder(cache_dir: str | None) -> Path:
    """The folder for prepared data, created where missing. Raises DataError where that is not possible."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(cache_dir) if cache_dir is not None else Path(base) / "openmoe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("not writable")
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise  # nothing is wrong with the key
        raise DataError(f"data.cache_dir={folder} can't be used: {error}") from None
    return folder


def build_once(final: Path, build: Callable[[Path], object]) -> Path:
    """`final`, after `build` has filled it if it did not exist.

    `build` works in a temporary folder beside it, which takes the final name in one step when all is on disk.
    Two processes may build at once: the first to finish wins, and both go on with its result.
    """
    if final.is_dir():
        return final
    temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=final.parent))
    try:
        build(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                sync_path(path)
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final
