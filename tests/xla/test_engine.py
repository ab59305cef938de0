"""Training over a mesh of eight devices against one process: losses, gradients, routing, programs."""

import pytest
from torch import Tensor

from tests.xla.equality import LOSSES, MESHES, MODELS, compare, programs
from tests.xla.training import MARK, STEPS, Training, batches, mesh, on_host, page

CLOSE = 2e-5


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("experiment", MODELS)
def test_equals_one_process(experiment: str, shape: tuple[int, int, int], devices: int) -> None:
    """Bugs: a sum over the wrong axis of the mesh, a gradient counted twice or not at all, groups that are
    cut, experts in another order; a shape or a number that makes a new program each step, an operation that
    runs on the host unnoticed."""
    found = compare(experiment, shape, devices)
    assert found.loss_error <= CLOSE
    assert found.norm_error <= CLOSE
    assert found.gradient_error <= CLOSE
    assert found.choices > 5_000
    assert found.other_choices == found.other_kept == 0
    assert found.new_programs[1:] == [0] * (STEPS - 1)
    assert not found.on_the_host


@pytest.mark.parametrize(
    ("experiment", "optim", "recompute", "micro_batches"),
    [
        ("tiny", "adafactor", "none", 4),
        ("tiny", "adamw", "full", 2),
        ("tiny_released", "adafactor", "full", 2),
    ],
)
def test_micro_batches_and_recomputation(
    experiment: str, optim: str, recompute: str, micro_batches: int, devices: int
) -> None:
    """Bugs: micro-batches that each count as a batch, rows given to them twice, a block that is run again
    with a gradient of its router losses missing; a program for each micro-batch, for each state of AdamW or
    for each learning rate; a gradient that is whole on each device between two micro-batches."""
    options = (f"optim={optim}", "model.n_layers=2", "model.moe_every=2")
    expected = Training(page(experiment, *options))
    over = (*mesh(2, 2, 2), f"parallel.recompute={recompute}", f"train.micro_batch_rows={4 // micro_batches}")
    training = Training(page(experiment, *options, *over), devices)
    rates = [0.01, 0.01, 0.01, 0.02, 0.001, 1.0]  # of them some are equal to weights of losses, one is 1
    compiled = []
    for number, rate in enumerate(rates):
        batch = batches(experiment)[MARK - 3 + number]
        assert len(training.micro(batch)) == micro_batches
        theirs, before = expected.step(number, batch, rate), programs()
        ours = training.step(number, batch, rate)
        compiled.append(programs() - before)
        if number < 4:  # the later rates blow the model up
            for name in LOSSES:
                near = pytest.approx(theirs[name], abs=CLOSE, rel=CLOSE)
                assert ours[name] == near, f"step {number}: {name}"
        if number == 0:
            [gradients] = on_host([list(training.gradients.values())])
            for name, gradient in zip(training.gradients, gradients, strict=True):
                whole = expected.gradients[name]
                error = (gradient - whole).abs().max() / whole.abs().max()
                assert error <= CLOSE, f"gradient of {name}: {error:.1e}"
        for name, param in training.ranks.named_parameters():
            assert parts(training.gradients[name]) == parts(param), f"gradient of {name}"
    assert compiled[1:] == [0] * (len(rates) - 1), f"new programs of each step: {compiled}"


def parts(x: Tensor) -> list[int]:
    """Shape of what one device has of it."""
    import torch_xla

    [shards] = torch_xla._XLAC._get_local_shards([x])
    return list(shards[0][0].shape)


def test_state_lies_as_its_parameters_do(devices: int) -> None:
    """Bug: a moment, or an expert's weight, that is whole on every device: right results, and the memory of
    a model that is not shared out."""
    training = Training(page("tiny_released", *mesh(1, 4, 2)), devices)
    found = {
        name: {"param": parts(p), **{k: parts(v) for k, v in training.optimizer.state[p].items()}}
        for name, p in training.ranks.named_parameters()
    }
    experts, d_ff, d_model, words = 8 // 4, 256 // 2, 128, 4480 // 2
    assert found["layers.3.moe.experts.wi_0"] == {
        "param": [experts, 2, d_ff, d_model], "v_col": [experts, 2, d_ff], "v_row": [experts, d_model],
    }  # fmt: skip
    assert found["layers.3.moe.experts.wo"] == {
        "param": [experts, d_model, d_ff], "v_row": [experts, d_model], "v_col": [experts, d_ff],
    }  # fmt: skip
    assert found["layers.0.ffn.wi_0"]["param"] == [2, d_ff, d_model]
    assert found["layers.0.attention.o.weight"]["param"] == [128, 128 // 2]
    assert found["head.weight"]["param"] == [words, d_model]
    assert found["layers.3.moe.router.weight"]["param"] == [8, d_model]
