"""Promises about the tree itself: what may import what, how long a file may be, what an install may lack."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SKIPPED_FOLDERS = {"tests", "build", "dist", "runs"}
MAX_LINES = 400


def rooms() -> list[str]:
    return sorted({path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"})


def modules() -> list[str]:
    """Import names of every module of every room."""
    names = []
    for room in rooms():
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(("openmoe", *parts)).removesuffix(".__init__"))
    return names


def setup_call() -> dict[str, ast.expr]:
    tree = ast.parse((ROOT / "setup.py").read_text())
    values: dict[str, ast.expr] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = node.value
        if isinstance(node, ast.keyword) and node.arg:
            values[node.arg] = node.value
    return values


def pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}


def test_no_source_file_is_longer_than_400_lines() -> None:
    """Bug: a module grows until nobody reads it whole."""
    long = []
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if parts[0] in SKIPPED_FOLDERS or any(part.startswith(".") for part in parts):
            continue
        lines = len(path.read_text().splitlines())
        if lines > MAX_LINES:
            long.append(f"{'/'.join(parts)}: {lines}")
    assert not long


def test_every_room_is_packaged_and_under_contract() -> None:
    """Bug: a new folder works in the editable install, but the wheel lacks it and no contract covers it."""
    packaged = ast.literal_eval(setup_call()["ROOMS"])
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert sorted(packaged) == rooms()
    assert sorted(settings["importlinter"]["root_packages"]) == [f"openmoe.{room}" for room in rooms()]


def test_pins_lie_in_the_tested_ranges() -> None:
    """Bug: requirements.txt and setup.py drift apart, so pip replaces what CI tested."""
    call = setup_call()
    extras = ast.literal_eval(call["extras_require"])
    stated = {
        "requirements.txt": ast.literal_eval(call["install_requires"]) + extras["dev"] + extras["deepspeed"],
        "requirements-xla.txt": extras["tpu"],
    }
    for file, requirements in stated.items():
        pinned = pins(file)
        for requirement in map(Requirement, requirements):
            name = requirement.name.lower().replace("_", "-")
            assert name in pinned, f"{file} lacks {name}"
            assert requirement.specifier.contains(pinned[name]), f"{file}: {name}=={pinned[name]}"


def test_model_data_and_optim_know_no_process_groups() -> None:
    """Bug: a collective inside a layer: it would need the layout, and break on XLA. import-linter cannot see
    below the top level of a foreign package, so torch.distributed is looked for here."""
    found = []
    for room in ("model", "data", "optim", "train"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names: list[str] = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Attribute):
                    names = [ast.unparse(node)]
                found += [
                    f"{path.relative_to(ROOT)}: {name}"
                    for name in names
                    if name.startswith("torch.distributed")
                ]
    assert not found


IMPORT_ALL = """
import importlib, importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"deepspeed", "torch_xla", "wandb", "transformers", "lm_eval", "triton"}:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Missing())
for name in sys.argv[1:]:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_available() or not torch.distributed.is_initialized()
"""


def test_every_module_imports_without_optional_packages_and_devices() -> None:
    """Bug: a top-level `import wandb` (deepspeed, torch_xla) makes a plain CPU install useless."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *modules()], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr


VIOLATIONS = {
    "upwards": ("model/bad.py", "from openmoe.train.loop import fit"),
    "sideways": ("optim/bad.py", "from openmoe.data.loader import batches"),
    "hydra": ("data/bad.py", "import hydra"),
    "deepspeed": ("train/bad.py", "import deepspeed"),
    "wandb": ("checkpoint/bad.py", "import wandb"),
}


@pytest.mark.parametrize("case", VIOLATIONS)
def test_import_contracts_bite(case: str, tmp_path: Path) -> None:
    """Bug: the contracts name packages that the linter does not resolve, and everything passes."""
    (tmp_path / ".typing").mkdir()
    (tmp_path / ".typing/openmoe").symlink_to("..")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for room in rooms():
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    (tmp_path / "train/loop.py").write_text("def fit(): ...\n")
    (tmp_path / "data/loader.py").write_text("def batches(): ...\n")

    def lint() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
            cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ".typing"},
        )  # fmt: skip

    clean = lint()
    assert clean.returncode == 0, clean.stdout + clean.stderr
    file, line = VIOLATIONS[case]
    (tmp_path / file).write_text(line + "\n")
    assert lint().returncode == 1
