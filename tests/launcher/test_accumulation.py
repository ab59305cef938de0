"""Micro-batches are a matter of memory: the training is the same for any number of them."""

from pathlib import Path

import pytest

from openmoe.launcher.entry import load_config
from openmoe.launcher.train import train

from .conftest import STEPS, Small, lines

VARIANTS = {
    "paper": ["model=tiny"],
    "released": ["model=tiny_released", "data.mix_rates=per_example", "data.row_end_eos=true"],
    "dense, prefix attention": ["model=tiny", "model.moe_every=0", "model.attention=prefix"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_change_nothing(variant: str, small: Small, tmp_path: Path) -> None:
    """Bug: a loss divided by the tokens of its micro-batch, router losses counted per micro-batch, groups
    or capacity that depend on the micro-batch, validation cut another way."""
    runs = {}
    for micro in (-1, 1, 2):
        if variant == "released" and micro == 1:
            continue  # its groups are of two rows
        run_dir = tmp_path / str(micro)
        arguments = small(run_dir, "train.precision=fp64", "optim.schedule.warmup_steps=20")
        arguments += ["checkpoint.every_steps=0", f"train.micro_batch_rows={micro}", *VARIANTS[variant]]
        train(load_config(arguments))
        runs[micro] = lines(run_dir)
    whole = runs.pop(-1)
    assert len(whole) == STEPS
    assert len({line["phase"] for line in whole}) == 2
    for micro, parts in runs.items():
        for line, part in zip(whole, parts, strict=True):
            assert part.keys() == line.keys()
            for name, value in line.items():
                near = pytest.approx(value, rel=1e-10, abs=1e-10) if name != "objective" else value
                assert part[name] == near, (micro, line["step"], name)


def test_the_original_normalises_each_micro_batch(small: Small, tmp_path: Path) -> None:
    """Bug: train.loss_normalization reaches nothing, and the test above holds for another reason."""
    first = {}
    for micro in (-1, 2):
        run_dir = tmp_path / str(micro)
        arguments = small(run_dir, "train.loss_normalization=per_microbatch", "train.steps=1")
        train(load_config([*arguments, f"train.micro_batch_rows={micro}"]))
        first[micro] = lines(run_dir)[0]["loss"]
    assert first[2] == pytest.approx(2 * first[-1], rel=0.2)
