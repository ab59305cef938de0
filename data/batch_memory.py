"""Memory for batches that is used again: touching fresh memory costs three times what filling it does."""

import sys
import threading
from collections.abc import Callable

import numpy as np

from openmoe.data.packing import BATCH_ARRAYS

# Makes an array of that many bytes, whatever it holds: ordinary memory, or one a device can read by itself.
AllocateBytes = Callable[[int], np.ndarray]

# The list of blocks, the loop's variable and the call of getrefcount itself.
_REFERENCES_TO_A_FREE_BLOCK = 3


def ordinary_memory(size_bytes: int) -> np.ndarray:
    """uint8 [size_bytes]."""
    return np.empty(size_bytes, np.uint8)


class BatchMemory:
    """Hands out batches of padding, in the memory of earlier ones of which nobody holds any array.

    A view of an array, or a tensor made of it, holds it too. Safe to use from several threads.
    """

    def __init__(self, allocate: AllocateBytes = ordinary_memory) -> None:
        self._allocate = allocate
        self._blocks: list[np.ndarray] = []
        self._lock = threading.Lock()

    def empty_batch(self, rows: int, seq_len: int) -> dict[str, np.ndarray]:
        """As packing.empty_batch."""
        kinds = {name: np.dtype(kind) for name, (kind, _) in BATCH_ARRAYS.items()}
        size_bytes = rows * seq_len * sum(kind.itemsize for kind in kinds.values())
        batch, start = {}, 0
        with self._lock:
            block = self._free_block(size_bytes)
            for name in sorted(kinds, key=lambda name: -kinds[name].itemsize):  # so that each is aligned
                stop = start + rows * seq_len * kinds[name].itemsize
                batch[name] = block[start:stop].view(kinds[name]).reshape(rows, seq_len)
                start = stop
        for name, (_, padding) in BATCH_ARRAYS.items():
            batch[name].fill(padding)
        return {name: batch[name] for name in BATCH_ARRAYS}

    def _free_block(self, size_bytes: int) -> np.ndarray:
        for block in self._blocks:
            if len(block) == size_bytes and sys.getrefcount(block) == _REFERENCES_TO_A_FREE_BLOCK:
                return block
        self._blocks.append(self._allocate(size_bytes))
        return self._blocks[-1]
