"""What the processes of one run must have in common: versions, source and configuration."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from openmoe.launcher.rendezvous import rank_list
from openmoe.launcher.schema import Config

# Nodes may keep the same data in different places; that it is the same, its fingerprint says.
PER_RANK_KEYS = frozenset({"data.root", "data.cache_dir", "data.tokenizer.path", "data.workers"})
_NOT_SET = "not set"
_SHOWN = 80


def versions() -> dict[str, str]:
    try:
        own = version("openmoe")
    except PackageNotFoundError:  # run from a folder
        own = "unknown"
    return {
        "the version of python": platform.python_version(),
        "the version of torch": torch.__version__,
        "the version of openmoe": own,
        "the source of openmoe": source_digest(Path(__file__).parents[1])[:12],
    }


def source_digest(root: Path) -> str:
    """sha256 over the Python and YAML files of the rooms below `root`."""
    digest = hashlib.sha256()
    rooms = sorted(path.parent for path in root.glob("*/__init__.py") if path.parent.name != "tests")
    for room in rooms:
        for path in sorted([*room.rglob("*.py"), *room.rglob("*.yaml")]):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def shared_keys(config: Config) -> dict[str, Any]:
    """Dotted key -> value, of all that the processes of a run must agree in."""
    flat: dict[str, Any] = {}
    _flatten(config.model_dump(mode="json"), "", flat)
    return {key: value for key, value in flat.items() if key not in PER_RANK_KEYS}


def _flatten(value: Any, key: str, flat: dict[str, Any]) -> None:
    if isinstance(value, dict) and value:
        for name, part in value.items():
            _flatten(part, f"{key}.{name}" if key else name, flat)
    elif isinstance(value, list) and value:
        for number, part in enumerate(value):
            _flatten(part, f"{key}[{number}]", flat)
    else:
        flat[key] = value


def differences(own: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """What `own` has instead, by key; keys in the order of `reference`, then of `own`."""
    keys = dict.fromkeys([*reference, *own])
    return {
        key: own.get(key, _NOT_SET)
        for key in keys
        if json.dumps(own.get(key, _NOT_SET)) != json.dumps(reference.get(key, _NOT_SET))
    }


def describe_difference(reference: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str | None:
    """One line about the first key in which not all agree, or None: "train.seq_len is 256 on ranks 0, 1 and
    128 on rank 2". `others` has the `differences` of each rank, by rank."""
    known = dict.fromkeys([*reference, *(key for other in others for key in other)])
    differing = [key for key in known if any(key in other for other in others)]
    if not differing:
        return None
    key = differing[0]
    ranks: dict[str, list[int]] = {}
    for rank, other in enumerate(others):
        ranks.setdefault(_shown(other.get(key, reference.get(key, _NOT_SET))), []).append(rank)
    parts = [f"{value} on {rank_list(holders)}" for value, holders in ranks.items()]
    more = f" (and {len(differing) - 1} more differ)" if len(differing) > 1 else ""
    return f"{key} is {', '.join(parts[:-1])} and {parts[-1]}; allowed the same on all{more}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
