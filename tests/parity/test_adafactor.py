"""Adafactor against trajectories of the original (t5x), parameters and moments, at every stored step."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from openmoe.optim.adafactor import Adafactor
from openmoe.optim.build import set_learning_rate
from openmoe.optim.config import AdafactorConfig
from openmoe.optim.factor_rules import FactorRule, rule_from_axes
from tests.parity.golden import Case, golden_files

FILES = golden_files("adafactor_*.npz")
DTYPES = (torch.float32, torch.float64)


def gradient(meta: dict, name: str, step: int) -> np.ndarray:
    """The gradient recipe of meta["grad_recipe"]; `step` counts from 0 in every file."""
    seed = int(re.search(r"seed=(\d+)", meta["grad_recipe"])[1])
    shape = meta["tensors"][name]["shape"]
    random = np.random.RandomState(100_000 + 10_000 * seed + 100 * step + meta["order"].index(name))
    g = random.standard_normal(shape) * meta["grad_scale"][name]
    if len(shape) >= 2:
        g *= 0.2 + np.arange(shape[-1]) / shape[-1]
    if step in (3, 11):
        g *= 50
    if step % 5 == 4:
        g[: max(1, shape[0] // 4)] = 0
    return g.astype(np.float32)


def start_params(case: Case) -> dict[str, np.ndarray]:
    """The file's own start, or that of a file of the same folder with the same tensors."""
    for path in (case.path, *FILES):
        other = Case(path)
        params = other.under("params_step0")
        if params and other.meta["tensors"] == case.meta["tensors"]:
            return params
    pytest.skip(f"no file has the start parameters of {case.path.name}")


def rules_of(meta: dict) -> dict[str, FactorRule]:
    least = meta["hyper"]["min_dim_size_to_factor"]
    return {
        name: rule_from_axes(tuple(t["shape"]), tuple(t["axes"]), min_dim_size_to_factor=least)
        for name, t in meta["tensors"].items()
    }


def config_of(hyper: dict) -> AdafactorConfig:
    assert hyper["multiply_by_parameter_scale"]
    assert hyper["factored"]
    assert not hyper["beta1"]
    assert not hyper["weight_decay_rate"]
    assert not hyper["step_offset"]
    keys = ("decay_rate", "clipping_threshold", "min_dim_size_to_factor", "epsilon1", "epsilon2")
    return AdafactorConfig(name="adafactor", **{key: hyper[key] for key in keys})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rules_factor_the_same_dimensions(path: Path) -> None:
    """A row taken for a column, or a matrix below 128 that is factored."""
    meta = Case(path).meta
    for name, rule in rules_of(meta).items():
        found = ast.literal_eval(meta["tensors"][name]["factored_dims_row_col"])
        dims = found[1] if found and found[0] == "heuristic" else found
        if dims is None:
            assert rule.split is None, name
            continue
        left, right = (1, 0) if rule.row_is_left else (0, 1)
        assert rule.split is not None, name
        assert all(d < rule.split for d in dims[1 - left]), name
        assert all(d >= rule.split for d in dims[1 - right]), name
        assert list(range(rule.batch_dims, len(rule.shape))) == meta["tensors"][name]["averaging_dims"], name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_trajectory(path: Path, dtype: torch.dtype) -> None:
    """Wrong place of an epsilon, clipping over all experts together, beta2 in float64, a wrong step count."""
    case = Case(path)
    meta = case.meta
    params = {
        name: torch.tensor(value, dtype=dtype, requires_grad=True)
        for name, value in start_params(case).items()
    }
    optimizer = Adafactor(params.items(), rules_of(meta), config_of(meta["hyper"]))
    optimizer.param_groups[0]["step"] = meta["start_step"]
    worst: dict[str, float] = {}
    for step, lr in enumerate(meta["lrs"]):
        for name, param in params.items():
            g = gradient(meta, name, step)
            if f"grads_step{step}/{name}" in case:
                np.testing.assert_array_equal(g, case[f"grads_step{step}/{name}"])
            param.grad = torch.tensor(g, dtype=dtype)
        set_learning_rate(optimizer, lr)
        optimizer.step()
        tolerance = 5e-5 if meta["start_step"] and step + 1 == 3 else 1e-6
        if dtype is torch.float64:
            tolerance *= 2  # the file's own float32 rounding, which float32 here repeats
        found = {f"params_step{step + 1}/{name}": param.detach() for name, param in params.items()}
        for name, param in params.items():
            for key, value in optimizer.state[param].items():
                found[f"state_step{step + 1}/{name}/{key}"] = value
        stored = {k for k in case.arrays.files if k.split("/")[0].endswith(f"_step{step + 1}")}
        stored = {k for k in stored if not k.startswith("grad")}
        assert stored <= found.keys()
        for key in stored:
            expected = torch.from_numpy(case[key]).to(dtype)
            assert found[key].shape == expected.shape, key
            rms = expected.square().mean().sqrt().item()
            error = (found[key] - expected).abs().max().item() / rms
            kind = key.split("_")[0]
            worst[kind] = max(worst.get(kind, 0.0), error)
            assert error <= tolerance, (key, error)
    assert set(worst) == {"params", "state"}
    print(f"{path.stem}, {dtype}: largest error / RMS {worst}")
