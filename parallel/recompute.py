"""Activation recomputation: what a block's forward pass keeps for its backward pass."""

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "selective", "full"]

# What `selective` keeps: results of matrix products and of attention, which are expensive to make and no
# larger than what is left out. Norms, gates, casts, permutations and collectives run again.
KEPT_OPERATIONS = (
    "mm", "bmm", "addmm", "_grouped_mm", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)  # fmt: skip


def recompute_block(block: nn.Module, mode: Recompute) -> None:
    """From now on the block's backward pass runs its forward pass again, all of it or what is cheap."""
    if mode == "none":
        return
    contexts: dict[str, Any] = {}
    if mode == "selective":
        kept = {
            getattr(torch.ops.aten, name).default
            for name in KEPT_OPERATIONS
            if hasattr(torch.ops.aten, name)  # by version of torch
        }
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, kept))
    # A forward pass draws no random numbers, so there is no state to save and restore.
    block.forward = partial(
        checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **contexts
    )


def _policy(kept: set[Any], _: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE
