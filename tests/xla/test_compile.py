"""A whole step as a program that is never run: what it holds, and what TPU v3's compiler makes of it."""

import gc
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest

from openmoe.launcher.entry import load_page
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.layout import lay_out
from openmoe.launcher.traced_step import StepProgram, trace_step
from openmoe.launcher.xla_compile import XlaCompilePage, compile_step, core_bytes, report, run_compiler
from openmoe.parallel.build import DTYPES
from openmoe.parallel.hlo import shapes_of
from openmoe.parallel.topology import TopologyError

pytest.importorskip("torch_xla", reason="torch_xla is missing here; run `make test-xla`")

ROOT = Path(__file__).resolve().parents[2]
COMPILER = ROOT / ".venv-xla-compile" / "bin" / "python"
SMALL = [
    "experiment=tiny", "model.n_layers=2", "train.seq_len=128", "train.precision=bf16", "parallel.expert=4",
    "parallel.tensor=2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _leave_no_placeholders() -> Iterator[None]:
    """What was traced can't be run: the next program that is, of all tensors there are, would die of it."""
    yield
    gc.collect()


def page(*overrides: str) -> XlaCompilePage:
    return load_page(XlaCompilePage, "xla_compile", list(overrides))


def trace(config: XlaCompilePage) -> StepProgram:
    topology = lay_out(config, 8, alone=True)
    dtypes = DTYPES[config.train.precision]
    return trace_step(config.model, config.parallel, config.optim, config.train, topology, dtypes)


def parameters(text: str) -> dict[int, tuple[str, str]]:
    """Number -> shape and layout."""
    found = re.findall(r"= (\S+?)(?:\{[\d,]*\})? parameter\((\d+)\), sharding=(\{.*?\})$", text, re.M)
    return {int(number): (shape, layout) for shape, number, layout in found}


def aliases(text: str) -> dict[int, int]:
    """Output -> parameter."""
    head = text.partition("\n")[0].partition("entry_computation_layout")[0]
    return {int(out): int(into) for out, into in re.findall(r"\{(\d+)\}: \((\d+),", head)}


def updated(text: str) -> list[int]:
    """The parameter that each output of the program is made of most directly, of those with its shape."""
    entry = text[text.index("\nENTRY ") :]
    lines = re.findall(r"^\s*(ROOT )?%([\w.\-]+) = (.*?)(?:\{[\d,]*\})? ([a-z\-]+)\((.*)$", entry, re.M)
    made_of = {name: re.findall(r"%([\w.\-]+)", rest.partition("), ")[0]) for _, name, _, _, rest in lines}
    shape_of = {name: shape for _, name, shape, _, _ in lines}
    number = {name: int(rest.partition(")")[0]) for _, name, _, kind, rest in lines if kind == "parameter"}
    root = next(name for is_root, name, *_ in lines if is_root)
    found = []
    for output in made_of[root]:
        near, seen = [output], {output}
        while near and not any(name in number and shape_of[name] == shape_of[output] for name in near):
            near = [below for name in near for below in made_of[name] if below not in seen]
            seen.update(near)
        same = [number[name] for name in near if name in number and shape_of[name] == shape_of[output]]
        found.append(same[0] if same else -1)
    return found


@pytest.mark.parametrize(("micro_batch_rows", "gradients"), [(-1, 0), (1, 1)])
def test_the_program_has_each_tensor_once_and_in_place(micro_batch_rows: int, gradients: int) -> None:
    """Bugs: an update is written beside the old value, or into that of another tensor; earlier micro-batches'
    gradients are left out; a parameter or a state without its layout, so whole on each core."""
    config = page(*SMALL, f"train.micro_batch_rows={micro_batch_rows}", "train.global_batch_rows=16")
    step = trace(config)
    assert step.micro_batches == (4 if gradients else 1)
    held, taken = parameters(step.text), aliases(step.text)
    assert len(set(taken.values())) == len(taken) > 60
    sources = updated(step.text)
    assert taken == {output: sources[output] for output in taken}
    # An expert lies along the expert axis, its hidden units along the model axis.
    wi_1 = [layout for shape, layout in held.values() if shape == "f32[8,256,128]"]
    assert len(wi_1) == (1 + gradients) * 2  # wi_0 too
    assert set(wi_1) == {"{devices=[4,2,1]0,1,2,3,4,5,6,7}"}


def test_nothing_is_materialised() -> None:
    """Bug: parameters, optimizer state or logits of a large model take memory while it is traced."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = trace(page(
        "experiment=openmoe_34b", "model.n_layers=4", "parallel.expert=8", "train.global_batch_rows=8",
    ))  # fmt: skip
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert "f32[32,12288,3072]" in step.text  # 4.8 GB each
    assert grown < 2**30


@pytest.mark.skipif(
    not os.access(COMPILER, os.X_OK), reason="no compiler here; `make xla-compile` installs it"
)
@pytest.mark.timeout(900)
def test_the_compiler_of_v3_takes_the_step(tmp_path: Path) -> None:
    """Bugs: an operation that TPUs lack; an alias that the compiler refuses; experts' weights are gathered; a
    compiled program is read wrongly."""
    asked = (f"xla_compile.python={COMPILER}", f"xla_compile.output={tmp_path}")
    command = [sys.executable, "-m", "openmoe.launcher.xla_compile", *SMALL, *asked]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["mesh"] == [1, 4, 2]
    counts = {(part["kind"], part["axes"]): part["count"] for part in result["collectives"]}
    assert counts["all-to-all", "expert"] == 4  # there and back, forward and backward, of one MoE layer
    memory = result["memory"]
    assert memory["arguments"] - memory["aliased"] < 2**20  # rows of tokens
    assert core_bytes(memory) < 2**30
    compiled = (tmp_path / "compiled.hlo").read_text()
    part = 2 * 128 * 128  # a core's share of wi_0 of 8 experts, [8, 256, 128]
    assert all(prod(shape) <= part for shape in shapes_of(compiled, "all-gather"))
    assert run.stdout.splitlines() == report(result)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.engine=torch", "parallel.engine=torch: allowed xla"),
        ("xla_compile.python=nowhere/python", "xla_compile.python=nowhere/python: no interpreter there"),
        ("xla_compile.cores=12", "xla_compile.cores=12: input should be 8, 16, 32 or 64"),
        ("parallel.expert=3", "parallel.expert=3"),
    ],
)
def test_bad_input_is_one_line(override: str, message: str) -> None:
    """Bug: a traceback, or the compiler's own words, for what can be known at the start."""
    with pytest.raises((ConfigError, TopologyError)) as error:
        compile_step(page(*SMALL, f"xla_compile.python={sys.executable}", override))
    assert len(str(error.value).splitlines()) == 1
    assert message in str(error.value)


def test_a_compiler_that_dies_says_why(tmp_path: Path) -> None:
    """Bug: its traceback, or nothing at all."""
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho Traceback >&2; echo libtpu is missing >&2; exit 1\n")
    interpreter.chmod(0o755)
    with pytest.raises(ChildProcessError, match=r"^the compiler ended with exit code 1: libtpu is missing$"):
        run_compiler(str(interpreter), tmp_path / "program", 8, tmp_path / "compiled")
