"""One training step of each size through the compiler of TPU v3: what a core holds, and what it sends.

    make xla-compile [CASES="NAME ..."]                # both environments are built where they are missing
    python -m benchmarks.xla_compile --compiler PYTHON [NAME ...]

Each case is `openmoe.launcher.xla_compile` in a process of its own, minutes of one core. Its figures go to
benchmarks/results/xla_compile/NAME.json; benchmarks/results/xla_compile.md is the table of all that have been
run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openmoe.launcher.xla_compile import CORE_GIB, GIB, MIB, core_bytes

RESULTS = Path(__file__).resolve().parent / "results" / "xla_compile"
KINDS = ("all-to-all", "all-reduce", "all-gather", "reduce-scatter", "collective-permute")


@dataclass(frozen=True)
class Case:
    experiment: str
    mesh: tuple[int, int, int]  # data, expert, model
    rows: int = 1  # of a data rank at a time
    recompute: str = "none"
    num_experts: int | None = None  # None: the model's
    micro_batches: int | None = None  # None: those of Table 12's batch

    @property
    def cores(self) -> int:
        data, expert, model = self.mesh
        return data * expert * model

    def overrides(self) -> list[str]:
        data, expert, model = self.mesh
        parts = [
            f"experiment={self.experiment}",
            f"xla_compile.cores={self.cores}",
            f"parallel.shard={data * expert}",
            f"parallel.expert={expert}",
            f"parallel.tensor={model}",
            f"parallel.recompute={self.recompute}",
            f"train.micro_batch_rows={self.rows}",
        ]
        if self.num_experts is not None:
            parts.append(f"model.num_experts={self.num_experts}")
        if self.micro_batches is not None:
            rows = self.rows * data * expert * self.micro_batches
            parts.append(f"train.global_batch_rows={rows}")
        return parts


# One expert on each group of cores: 8 x 8 cores with 8 experts stand for the paper's 32 x 8 with 32. Capacity
# is factor x tokens / experts, so a core has as many slots, and the same weights, in both.
LARGE = {"num_experts": 8, "micro_batches": 64}
CASES = {
    "base_1_8_1": Case("openmoe_base", (1, 8, 1)),
    "base_1_8_1_rows_2": Case("openmoe_base", (1, 8, 1), rows=2),
    "base_1_8_1_rows_4_recompute": Case("openmoe_base", (1, 8, 1), rows=4, recompute="full"),
    "base_2_4_1": Case("openmoe_base", (2, 4, 1)),
    "base_1_4_2": Case("openmoe_base", (1, 4, 2)),
    "base_1_8_2": Case("openmoe_base", (1, 8, 2), micro_batches=16),
    "base_1_4_2_experts_8": Case("openmoe_base", (1, 4, 2), num_experts=8, micro_batches=16),
    "8b_1_8_8": Case("openmoe_8b", (1, 8, 8), **LARGE),
    "8b_1_8_8_rows_2": Case("openmoe_8b", (1, 8, 8), rows=2, **LARGE),
    "8b_1_8_8_rows_4_recompute": Case("openmoe_8b", (1, 8, 8), rows=4, recompute="full", **LARGE),
    "34b_1_8_8": Case("openmoe_34b", (1, 8, 8), **LARGE),
    "34b_1_8_8_recompute": Case("openmoe_34b", (1, 8, 8), recompute="full", **LARGE),
    "34b_1_8_8_rows_2_recompute": Case("openmoe_34b", (1, 8, 8), rows=2, recompute="full", **LARGE),
}


def run(name: str, case: Case, compiler: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "openmoe.launcher.xla_compile", *case.overrides(),
             f"xla_compile.python={compiler}", f"xla_compile.output={folder}"],
            check=True,
        )  # fmt: skip
        result = (Path(folder) / "result.json").read_text()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(result)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Of the cases that have a result."""
    columns = [
        "model", "mesh (data, expert, model)", "experts", "rows of a data rank", "recompute", "arguments",
        "temporary", "program", "a core", *KINDS, "compiled in",
    ]  # fmt: skip
    lines = [
        f"Compiled with libtpu 0.0.21 for TPU v3. Memory in GiB; a core has {CORE_GIB}. Each program is the",
        "last of a step, where gradients of earlier micro-batches come in. Collectives: their number, and",
        "the MiB that go in on one core.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for name, case in CASES.items():
        if name in results:
            lines.append(_row(case, results[name]))
    return "\n".join(lines) + "\n"


def _row(case: Case, result: dict[str, Any]) -> str:
    mesh = " x ".join(map(str, case.mesh))
    experts = "all" if case.num_experts is None else str(case.num_experts)
    start = f"| {case.experiment} | {mesh} | {experts} | {case.rows} | {case.recompute} |"
    seconds = f"{result['seconds']:.0f} s |"
    if "memory" not in result:
        return f"{start} | | | {_excess(result['error'])} |" + " |" * len(KINDS) + seconds
    memory = result["memory"]
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for part in result["collectives"]:
        sums[part["kind"]][0] += part["count"]
        sums[part["kind"]][1] += part["operand_bytes"]
    parts = [f"{memory[key] / GIB:.2f}" for key in ("arguments", "temporary", "program")]
    parts.append(f"**{core_bytes(memory) / GIB:.2f}**")
    parts += [f"{sums[kind][0]}: {sums[kind][1] / MIB:,.1f}" if kind in sums else "" for kind in KINDS]
    return " | ".join([start.removesuffix(" |"), *parts, seconds])


def _excess(error: str) -> str:
    used = error.partition("Used ")[2].partition(" of")[0]
    return f"does not fit: {used}" if used else "refused"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--compiler", default=".venv-xla-compile/bin/python", metavar="PYTHON")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all. {', '.join(CASES)}")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in CASES]
    if unknown:
        parser.error(f"{unknown[0]}: allowed {', '.join(CASES)}")
    for name in arguments.names or CASES:
        print(f"\n{name}", flush=True)
        run(name, CASES[name], arguments.compiler)
        results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
        RESULTS.with_suffix(".md").write_text(table(results))


if __name__ == "__main__":
    main()
