"""The accounting page of the named experiments."""

import pytest

from openmoe.launcher.account import account
from openmoe.launcher.entry import load_config


@pytest.mark.parametrize(
    ("experiment", "parameters"),
    [
        ("openmoe_base", 846_846_720),
        ("openmoe_8b", 9_304_901_632),
        ("openmoe_34b", 35_399_076_864),
        ("openmoe_base_released", 799_663_104),
        ("openmoe_8b_released", 11_855_046_656),
        ("openmoe_34b_released", 46_270_737_408),
    ],
)
def test_each_named_size_is_what_its_config_says(experiment: str, parameters: int) -> None:
    """Bug: a typing error in a config page makes another model of that name."""
    config = load_config([f"experiment={experiment}"])
    lines = account(config.model, config.train.seq_len).splitlines()
    totals = [line for line in lines if line.strip().startswith("total")]
    assert f"{parameters:,}" in totals[0]
    assert f"{parameters:,}" in totals[1]


def test_table_11_is_printed_beside_its_rule() -> None:
    """Bug: the paper's figure shown for a model that it does not describe."""
    page = account(load_config(["experiment=openmoe_8b"]).model, 2048)
    for printed in ("8.7B", "2.1B", "2.6B"):
        assert f"printed {printed}" in page
    assert "printed" not in account(load_config(["experiment=tiny"]).model, 256)


def test_dense_models_have_a_page() -> None:
    """Bug: a model without experts breaks the accounting."""
    config = load_config(["experiment=tiny", "model.moe_every=0"])
    assert "dense" in account(config.model, 256)
