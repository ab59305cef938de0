"""Text that every Python brings along, read from the running interpreter, so a first run downloads nothing.

Three sources: `manual` (the language reference of `pydoc_data.topics`), `docstrings` (of the standard
library, one document a module) and `code` (the standard library without its docstrings). The documents are
the same for the same Python.
"""

import ast
import hashlib
import inspect
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from openmoe.data.cache import build_once
from openmoe.data.errors import DataError
from openmoe.data.raw import RawSource, folder_sources

NAMES = ("code", "docstrings", "manual")

# Folders of the library that hold tests, generated tables, other people's packages or the manual itself.
_SKIPPED = frozenset(
    (
        *("__pycache__", "__phello__", "dist-packages", "encodings", "idle_test", "lib2to3"),
        *("pydoc_data", "site-packages", "test", "tests"),
    )
)
# Part of the cache key: raise it when the documents made below change.
_FORMAT = 1

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def embedded_sources(names: Sequence[str] | None, cache: Path) -> list[RawSource]:
    """The embedded sources called `names` (None: all), written to `cache`. Raises DataError."""
    for name in names or ():
        if name not in NAMES:
            raise DataError(
                f"source {name!r} is not embedded; there are {', '.join(NAMES)} (data.root names a folder)"
            )
    modules = _modules()
    digest = hashlib.sha256(f"{_FORMAT} {sys.version}".encode())
    for path in modules:
        digest.update(path.read_bytes())
    folder = build_once(cache / f"embedded-{digest.hexdigest()[:32]}", partial(_write, modules))
    return folder_sources(str(folder), names)


def _write(modules: Sequence[Path], folder: Path) -> None:
    library = [_split_module(path) for path in modules]
    documents: dict[str, Iterable[str]] = {
        "manual": _manual(),
        "docstrings": (docstrings for docstrings, _ in library),
        "code": (code for _, code in library),
    }
    for name, texts in documents.items():
        (folder / name).mkdir()
        with (folder / name / "documents.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts if text)


def _modules() -> list[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in library.rglob("*.py") if path.is_file())
    kept = [path for path in paths if _SKIPPED.isdisjoint(path.relative_to(library).parts)]
    if not kept:
        raise DataError(f"this Python has no library sources in {library}; give data.root a folder of text")
    return sorted(kept, key=lambda path: path.relative_to(library).parts)


def _manual() -> Iterator[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError("this Python has no pydoc_data.topics; give data.root a folder of text") from None
    for name in sorted(topics):
        yield topics[name]


def _split_module(path: Path) -> tuple[str, str]:
    """The module's docstrings, joined, and its code without them; both empty for what is no module."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            constants = _docstrings(ast.parse(source))
    except (UnicodeDecodeError, SyntaxError):  # templates, and tests of other encodings
        return "", ""
    docstrings = [inspect.cleandoc(str(constant.value)) for constant in constants]
    code = _without(source, constants)
    return "\n\n".join(docstrings), code if code.strip() else ""


def _docstrings(tree: ast.Module) -> list[ast.Constant]:
    """The docstrings of a module, its classes and functions, in the order of the source."""
    found = []
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, _DOCUMENTED) and node.body and isinstance(node.body[0], ast.Expr):
            constant = node.body[0].value
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                found.append(constant)
        # Only statements can hold functions and classes: walking expressions too takes three times as long.
        pending += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
    return sorted(found, key=lambda constant: constant.lineno)


def _without(source: str, constants: Sequence[ast.Constant]) -> str:
    """`source` without the lines that the docstrings `constants` stand on alone."""
    lines = source.split("\n")
    removed: set[int] = set()
    for constant in constants:
        first, last = constant.lineno - 1, (constant.end_lineno or constant.lineno) - 1
        before = lines[first].encode()[: constant.col_offset]
        after = lines[last].encode()[constant.end_col_offset :]
        if not before.strip() and not after.strip():
            removed.update(range(first, last + 1))
    return "\n".join(line for number, line in enumerate(lines) if number not in removed)
