"""Where the ranks of a case compute: on the CPU, or each on a GPU of its own (`make test-gpu`)."""

import os

import torch
import torch.distributed as dist

ON_GPUS = os.environ.get("OPENMOE_TEST_DEVICE") == "cuda"
BACKEND = "cpu:gloo,cuda:nccl" if ON_GPUS else "gloo"


def gpu(rank: int) -> torch.device | None:
    """The GPU of this rank where cases run on GPUs."""
    return torch.device("cuda", rank) if ON_GPUS else None


def device() -> torch.device:
    """This process's."""
    return gpu(dist.get_rank() if dist.is_initialized() else 0) or torch.device("cpu")
