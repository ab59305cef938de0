"""Compile one training step for TPU v3 without a TPU: `python -m openmoe.launcher.xla_compile experiment=NAME
[xla_compile.cores=N] [key=value ...]`, in an environment with torch_xla (`make xla-compile`).

The step is the run's own, traced over as many virtual devices as the slice has cores; the compiler is that of
libtpu, in an environment of its own.
"""

import json
import os
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from openmoe.data.config import PathText
from openmoe.launcher.entry import run_command
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.layout import count_ranks, lay_out
from openmoe.launcher.schema import Config
from openmoe.launcher.traced_step import trace_step
from openmoe.parallel import v3_compile
from openmoe.parallel.build import DTYPES
from openmoe.parallel.hlo import collectives

GIB, MIB = 2**30, 2**20
CORE_GIB = 15.48  # what libtpu lets a program have of a core's 16 GiB


class XlaCompileConfig(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    # Cores of the slice, one device of the mesh each; what can be traced here ends at 127 devices.
    cores: Literal[8, 16, 32, 64]
    # Interpreter with jax, jaxlib and libtpu, whose versions requirements-xla-compile.txt pins.
    python: PathText
    # Folder for the program, what became of it, and the figures.
    output: PathText | None


class XlaCompilePage(Config):
    xla_compile: XlaCompileConfig


def main() -> None:
    run_command(compile_step, XlaCompilePage, "xla_compile")


def compile_step(page: XlaCompilePage) -> None:
    """Prints what one core holds and sends in a step.

    Raises ConfigError where there is no compiler, ChildProcessError where it dies. That it refuses a program
    is a result.
    """
    asked = page.xla_compile
    if page.parallel.engine != "xla":
        raise ConfigError(f"parallel.engine={page.parallel.engine}: allowed xla")
    if not os.access(asked.python, os.X_OK):
        raise ConfigError(
            f"xla_compile.python={asked.python}: no interpreter there; make xla-compile builds one"
        )
    os.environ["PJRT_DEVICE"] = "CPU"
    os.environ["CPU_NUM_DEVICES"] = str(asked.cores)
    topology = lay_out(page, count_ranks(page, 1), alone=True)
    step = trace_step(
        page.model, page.parallel, page.optim, page.train, topology, DTYPES[page.train.precision]
    )
    with ExitStack() as stack:
        folder = Path(asked.output or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        program, compiled = folder / "program.hlo", folder / "compiled.hlo"
        program.write_text(step.text)
        found = run_compiler(asked.python, program, asked.cores, compiled)
        result: dict[str, Any] = {
            "mesh": topology.xla_shape(),
            "rows_per_core": step.rows / asked.cores,
            "rows": step.rows,
            "micro_batches": step.micro_batches,
            "recompute": page.parallel.recompute,
            **found,
        }
        if "memory" in found:
            result["collectives"] = [
                asdict(part) for part in collectives(compiled.read_text(), topology.xla_shape())
            ]
        if asked.output:
            (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(report(result)))


def run_compiler(python: str, program: Path, cores: int, compiled: Path) -> dict[str, Any]:
    """What `parallel.v3_compile` found. Raises ChildProcessError with the last line of one that died."""
    command = [python, v3_compile.__file__, str(program), str(cores), str(compiled)]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONPATH")
    }
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    if run.returncode or not lines:
        last = (run.stderr.strip().splitlines() or ["no word of it"])[-1]
        raise ChildProcessError(f"the compiler ended with exit code {run.returncode}: {last}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def report(result: dict[str, Any]) -> list[str]:
    """The page for people."""
    data, expert, model = result["mesh"]
    more = "" if result["micro_batches"] == 1 else f", the last of {result['micro_batches']}"
    lines = [
        f"One step on {data * expert * model} cores of TPU v3 (data {data}, expert {expert}, model {model}), "
        f"a micro-batch of {result['rows']} rows{more}, recompute {result['recompute']}: compiled in "
        f"{result['seconds']:.0f} s",
    ]
    if "memory" not in result:
        return [*lines, f"The compiler refuses it: {result['error'].strip().splitlines()[0]}"]
    memory = result["memory"]
    total = core_bytes(memory)
    return [
        *lines,
        f"Memory of a core: {total / GIB:.2f} of {CORE_GIB} GiB",
        *(f"  {name:<40}{size / GIB:>10.3f} GiB" for name, size in memory.items()),
        "Collectives: what goes in on one core",
        f"  {'kind':<20}{'along':<18}{'times':>8}{'MiB':>12}",
        *(
            f"  {part['kind']:<20}{part['axes']:<18}{part['count']:>8}{part['operand_bytes'] / MIB:>12.3f}"
            for part in result["collectives"]
        ),
    ]


def core_bytes(memory: dict[str, int]) -> int:
    """What a core must hold; outputs that take over the memory of arguments count once."""
    return (
        memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporary"] + memory["program"]
    )


if __name__ == "__main__":
    main()
