"""Activation recomputation: what a block's forward pass keeps for its backward pass."""

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from openmoe.model.experts import Experts
from openmoe.model.layers import Attention, FeedForward, RMSNorm

Recompute = Literal["none", "selective", "full"]

# What `selective` keeps of a module: results of matrix products and of attention, expensive to make and no
# larger than what is left out. Norms, gates, rotations and casts run again, collectives don't.
KEPT_OPERATIONS = (
    "mm", "bmm", "addmm", "_grouped_mm", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip
SELECTIVE_MODULES = (Attention, FeedForward, Experts, RMSNorm)


def recompute_block(block: nn.Module, mode: Recompute) -> None:
    """From now on the block's backward pass runs its forward pass again, all of it or what is cheap.

    A forward pass draws no random numbers, so there is no state to save and restore.
    """
    if mode == "full":
        _checkpoint(block)
    elif mode == "selective":
        operations = (getattr(torch.ops.aten, name, None) for name in KEPT_OPERATIONS)  # by version of torch
        kept = {operation.default for operation in operations if operation is not None}
        contexts = partial(create_selective_checkpoint_contexts, partial(_policy, kept))
        # Module by module: what FSDP does between them is not the same both times, which torch refuses.
        for module in block.modules():
            if isinstance(module, SELECTIVE_MODULES):
                _checkpoint(module, context_fn=contexts)


def _checkpoint(module: nn.Module, **options: Any) -> None:
    module.forward = partial(
        checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False, **options
    )


def _policy(kept: set[Any], _: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE
