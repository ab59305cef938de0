"""Copies of a run's tensors in host memory, from which a save goes on while the training does.

Tensors of a training change in the update only, so its forward and backward pass may run beside the copying:

    copies.begin(tensors)      # in the thread that trains
    copies.take()              # in the thread that saves
    copies.wait()              # in the thread that trains, before the next update
"""

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from openmoe.checkpoint.shards import Part
from openmoe.checkpoint.storage import part_here
from openmoe.parallel.spread_tensors import SpreadTensor


class HostCopies:
    """What this process holds of each tensor a second time, in memory that is used again each time."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._parts: dict[str, Tensor] = {}
        self._copied: dict[str, Part] = {}
        self._training: torch.cuda.Event | None = None  # on a GPU: the update before the save is done
        self._taken = threading.Event()
        self._taken.set()

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """These are to be copied as they are now, on a GPU as they will be when it has come to this place.

        Those over many devices (XLA) are copied here: in another thread that would get in the training's way.
        """
        spread = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, SpreadTensor)}
        self._copied = {name: tensor.written_here() for name, tensor in spread.items()}
        self._parts = {
            name: part_here(tensor).detach() for name, tensor in tensors.items() if name not in spread
        }
        self._training = None
        if any(part.is_cuda for part in self._parts.values()):
            self._training = torch.cuda.Event()
            self._training.record()
        self._taken.clear()

    def take(self) -> dict[str, Part]:
        """The copies, valid until the next `begin`. To be called once."""
        try:
            self._buffers = {name: self._buffer(name, part) for name, part in self._parts.items()}
            if self._training is None:
                for name, part in self._parts.items():
                    self._buffers[name].copy_(part)
            else:
                self._copy_from_gpu(self._training)
            copied, self._copied = self._copied, {}  # not in buffers: the save alone holds them
            return self._buffers | copied
        finally:
            self.release()

    def wait(self) -> None:
        """Returns when the tensors may change."""
        self._taken.wait()

    def release(self) -> None:
        """Nothing is left to copy, or nobody is going to."""
        self._parts, self._copied = {}, {}
        self._taken.set()

    def _copy_from_gpu(self, training: torch.cuda.Event) -> None:
        (device,) = {part.device for part in self._parts.values() if part.is_cuda}
        stream = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            stream.wait_event(training)
            for name, part in self._parts.items():
                self._buffers[name].copy_(part, non_blocking=True)
            stream.synchronize()

    def _buffer(self, name: str, part: Tensor) -> Tensor:
        found = self._buffers.get(name)
        if found is not None and (found.shape, found.dtype) == (part.shape, part.dtype):
            return found
        return torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
