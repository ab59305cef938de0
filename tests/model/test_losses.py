"""The chunked head + loss against the plain computation, and its memory."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from openmoe.model import losses
from openmoe.model.losses import linear_cross_entropy
from openmoe.model.losses_by_position import positions_head_loss
from openmoe.model.tensor_ranks import ONE_RANK


def plain(hidden, weight, targets):
    logits = hidden.double() @ weight.double().t()
    return (
        F.cross_entropy(logits, targets, reduction="none"),
        logits.logsumexp(-1),
        logits.argmax(-1) == targets,
    )


@pytest.mark.parametrize("vocab", [7, 1000, 4097])
def test_equals_plain_form(vocab, monkeypatch):
    """A slip at a tile's edge, in the running maximum or in either gradient."""
    monkeypatch.setattr(losses, "TILE_BYTES", 4 * 33 * 100)  # 100 words a tile: many tiles, a ragged last one
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(33, 16, generator=generator, dtype=torch.float64) * 3
    weight = torch.randn(vocab, 16, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (33,), generator=generator)
    targets[:2] = torch.tensor([0, vocab - 1])
    scale = torch.randn(2, 33, generator=generator, dtype=torch.float64)
    gradients = []
    for function in (plain, linear_cross_entropy):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        nll, log_z, correct = function(h, w, targets)
        (nll * scale[0] + log_z.square() * scale[1]).sum().backward()
        gradients.append((nll, log_z, correct, h.grad, w.grad))
    for ours, reference in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)


def test_first_of_equal_logits_is_the_guess():
    """Counting every tie with the target as right: in bfloat16 ties are common and accuracy would be
    flattered."""
    hidden, weight = torch.ones(3, 2), torch.ones(5, 2)
    *_, correct = linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 4]))
    assert correct.tolist() == [True, False, False]


@pytest.mark.parametrize(("positions", "row_shares"), [(1, 1), (4, 3), (4, 2), (11, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tiles_of_positions_equal_the_plain_form(positions, row_shares, dtype):
    """A slip at a tile's edge or in either gradient; a gradient of the weight that is summed in bfloat16."""
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(3, 11, 16, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(50, 16, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(50, (3, 11), generator=generator)
    scale = torch.randn(2, 33, generator=generator, dtype=torch.float64)
    by_position = positions_head_loss(4 * positions * 3 * 50, row_shares=row_shares)
    found = []
    for function in (plain, lambda h, w, t: by_position(h.unflatten(0, (3, 11)), w, targets, ONE_RANK)):
        h = hidden.flatten(0, 1).clone().requires_grad_()
        w = weight.to(torch.promote_types(dtype, torch.float32)).clone().requires_grad_()
        results = [x.flatten() for x in function(h, w, targets.flatten())]
        (results[0] * scale[0] + results[1].square() * scale[1]).sum().backward()
        found.append((*results, h.grad, w.grad))
    wide = dtype == torch.float64
    assert found[1][0].dtype == (torch.float64 if wide else torch.float32)
    for ours, reference in zip(found[1], found[0], strict=True):
        largest = reference.double().abs().max()
        error = (ours.double() - reference.double()).abs().max()
        assert error <= (1e-10 if wide else 2e-2) * max(1.0, largest)


def test_first_of_equal_logits_is_the_guess_in_tiles_of_positions():
    """See above; without an argmax the places of equal logits have to be compared."""
    hidden, weight = torch.ones(1, 3, 2), torch.ones(5, 2)
    *_, correct = positions_head_loss(1)(hidden, weight, torch.tensor([[0, 1, 4]]), ONE_RANK)
    assert correct.tolist() == [[True, False, False]]


def test_no_loss_tokens():
    """A micro-batch of padding has no loss position at all; its gradient must be zero, not an error."""
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    nll, _, _ = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long))
    nll.sum().backward()
    assert weight.grad.abs().sum() == 0


MEMORY_SCRIPT = """
import resource, sys, torch
from openmoe.model.losses import linear_cross_entropy
from openmoe.model.losses_by_position import positions_head_loss
from openmoe.model.tensor_ranks import ONE_RANK
d_model, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
def mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
hidden = torch.randn(2048, d_model, dtype=dtype).requires_grad_()
weight = torch.empty(256_384, d_model).normal_(std=0.02).requires_grad_()
targets = torch.randint(256_384, (2048,))
small = linear_cross_entropy(hidden[:8], weight[:64], targets[:8] % 64)[0].sum()
torch.autograd.grad(small, (hidden, weight))  # libraries loaded, threads started, one weight gradient touched
before = mib()
nll, log_z, _ = linear_cross_entropy(hidden, weight, targets)
(nll + 1e-3 * log_z.square()).sum().backward()
print(mib() - before)
"""


def extra_mib(d_model: int, dtype: str) -> float:
    """Peak memory in MiB beyond inputs, weight and gradients at 2048 tokens x 256,384 words.

    The warm-up has already held one gradient of the whole weight, so the high-water mark includes it.
    """
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(d_model), dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    return float(done.stdout)


def test_never_holds_the_logits():
    """Logits of 2048 tokens are 2 GiB in float32; the plain way takes over 4 GiB with their gradient."""
    assert extra_mib(32, "float32") < 300
