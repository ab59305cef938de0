"""Every layout, several variants of both models: `python -m tests.distributed.full_product [FOLDER]`.

Takes one to two hours on two cores. FOLDER, benchmarks/results unless given, gets layouts.json, which grows
by a case at a time and lets a later call go on from there, and layouts.md, the worst errors of each layout.
Exit code 1 where a case fails or is not within the limits.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from openmoe.parallel.topology import Topology
from tests.distributed.comparison import (
    LIMITS,
    compare,
    setup,
    train_in_one_process,
    train_under_layout,
)
from tests.distributed.layouts import LAYOUTS, Variant, name_of, several_variants_each
from tests.distributed.pool import ROOT, CaseFailed, Pool

Entry = dict[str, Any]
ERRORS = ("loss_error", "gradient_error", "grad_norm_error")


def main(folder: Path) -> int:
    path = folder / "layouts.json"
    entries: dict[str, Entry] = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        pool = Pool(Path(temporary))
        try:
            cases = several_variants_each()
            for number, (topology, variant) in enumerate(cases, 1):
                name = f"{name_of(topology)}-{variant}"
                if name not in entries:
                    entries[name] = try_case(pool, Path(temporary), topology, variant)
                    path.write_text(json.dumps(entries, indent=1) + "\n")
                    print(f"{number}/{len(cases)} {name}: {summary(entries[name])}", flush=True)
        finally:
            pool.close()
    table = markdown(entries)
    (folder / "layouts.md").write_text(table)
    print(table)
    return 0 if all(entry["ok"] for entry in entries.values()) else 1


def try_case(pool: Pool, references: Path, topology: Topology, variant: Variant) -> Entry:
    case = setup(topology, variant)
    file = references / f"{case.reference_key}.pt"
    try:
        if not file.exists():
            pool.run(train_in_one_process, 1, case, file, timeout_seconds=300)
        start = time.perf_counter()
        ranks = pool.run(train_under_layout, topology.world_size, case, topology, file, timeout_seconds=300)
        seconds = time.perf_counter() - start
    except CaseFailed as failure:
        return {"ok": False, "failure": str(failure)}
    found = compare(case, topology, torch.load(file, weights_only=False), ranks)
    return {"ok": found.within_limits(), "seconds": round(seconds, 1), **asdict(found)}


def summary(entry: Entry) -> str:
    if "failure" in entry:
        return entry["failure"].rstrip().rpartition("\n")[2]
    return f"{'ok' if entry['ok'] else 'NOT WITHIN LIMITS'} {entry['seconds']} s, " + ", ".join(
        f"{key} {entry[key]:.1e}" for key in LIMITS
    )


COLUMNS = (
    "ranks",
    "replicate",
    "shard",
    "tensor",
    "expert",
    "cases",
    "loss, 12 steps, float64",
    "gradients, float32",
    "gradient norm",
    "tokens routed otherwise",
    "near ties left out",
    "failed",
)


def markdown(entries: dict[str, Entry]) -> str:
    rows: list[Sequence[object]] = [COLUMNS, ["---"] * len(COLUMNS)]
    for topology in LAYOUTS:
        tried = [entry for name, entry in entries.items() if name.startswith(f"{name_of(topology)}-")]
        measured = [entry for entry in tried if "failure" not in entry]
        otherwise = sum(entry["other_choices"] + entry["other_kept"] for entry in measured)
        rows.append(
            (
                topology.world_size,
                *topology.dense_shape,
                topology.expert,
                len(tried),
                *(worst(entry[key] for entry in measured) for key in ERRORS),
                f"{otherwise} of {sum(entry['choices'] for entry in measured)}",
                sum(entry["near_ties"] for entry in measured),
                sum(not entry["ok"] for entry in tried),
            )
        )
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def worst(errors: Iterable[float]) -> str:
    return f"{max(errors, default=float('nan')):.1e}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results"))
