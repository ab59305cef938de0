"""Which rule each parameter of the model gets."""

import pytest
import torch

from openmoe.optim.factor_rules import rule_for, rule_from_axes


def rule(name: str, *shape: int, least: int = 128):
    return rule_for(f"layers.1.{name}", shape, least)


@pytest.mark.parametrize(
    ("name", "shape", "state"),
    [
        ("embedding.weight", (512, 256), {"v_row": (256,), "v_col": (512,)}),
        ("head.weight", (512, 256), {"v_row": (256,), "v_col": (512,)}),
        ("attention.q.weight", (384, 256), {"v_row": (256,), "v_col": (384,)}),
        ("attention.o.weight", (256, 384), {"v_row": (256,), "v_col": (384,)}),
        ("ffn.wi_0", (2, 160, 256), {"v_row": (256,), "v_col": (2, 160)}),
        ("ffn.wi_0", (2, 96, 256), {"v_row": (2, 96), "v_col": (256,)}),
        ("ffn.wi_0", (160, 256), {"v_row": (160,), "v_col": (256,)}),
        ("ffn.wi_0", (2, 60, 256), {"v": (2, 60, 256)}),
        ("ffn.wo", (256, 384), {"v_row": (256,), "v_col": (384,)}),
        ("ffn.wo", (256, 127), {"v": (256, 127)}),
        ("moe.experts.wi_0", (4, 2, 24, 40), {"v_row": (4, 40), "v_col": (4, 2, 24)}),
        ("moe.experts.wi_0", (4, 24, 40), {"v_row": (4, 40), "v_col": (4, 24)}),
        ("moe.experts.wi_1", (4, 24, 40), {"v_row": (4, 40), "v_col": (4, 24)}),
        ("moe.experts.wo", (4, 40, 24), {"v_row": (4, 40), "v_col": (4, 24)}),
        ("moe.router.weight", (16, 256), {"v": (16, 256)}),
        ("attention_norm.scale", (256,), {"v": (256,)}),
    ],
)
def test_state_of_each_parameter(name: str, shape: tuple, state: dict) -> None:
    """An FFN's two halves factored apart, experts treated as one matrix, rows and columns swapped."""
    dims = rule(name, *shape).state_dims
    assert {key: tuple(shape[d] for d in kept) for key, kept in dims.items()} == state


@pytest.mark.parametrize(
    ("name", "row_is_left"),
    [
        ("embedding.weight", True),  # [V, D] in the original too: the last dimension, D, is the column
        ("attention.q.weight", False),  # [D, J] in the original: J, first here, is the column
        ("attention.o.weight", False),
        ("head.weight", False),
    ],
)
def test_of_two_equal_sides_the_last_one_of_the_original_is_the_column(name: str, row_is_left: bool) -> None:
    """Ties decided by our transposed layout: v_row and v_col of a converted checkpoint would be swapped."""
    assert rule(name, 256, 256).row_is_left is row_is_left


def test_an_unknown_parameter_is_refused() -> None:
    """A new module that trains with a guessed rule."""
    with pytest.raises(ValueError, match=r"no factoring rule for the parameter layers\.1\.adapter\.weight"):
        rule("adapter.weight", 256, 256)
    with pytest.raises(ValueError, match="has shape"):
        rule("attention.q.weight", 2, 256, 256)
    with pytest.raises(ValueError, match="no factoring role"):
        rule_from_axes((4, 4), ("embed", "colour"))
    with pytest.raises(ValueError, match="alternate"):
        rule_from_axes((4, 4, 4), ("embed", "mlp", "embed"))


def test_a_view_shares_memory_with_the_parameter() -> None:
    """A rule that copies: the parameter would never change."""
    weight = torch.zeros(4, 2, 24, 40)
    view = rule("moe.experts.wi_0", *weight.shape).view(weight)
    assert view.shape == (4, 48, 40)
    assert view.data_ptr() == weight.data_ptr()
