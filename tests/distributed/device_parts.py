"""In place of a mesh of XLA devices that several processes share: what its devices hold, in plain numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openmoe.parallel.spread_tensors import Box, SpreadTensor

Spec = Sequence[str | None]  # by dimension the axis of the mesh that cuts it


@dataclass(frozen=True)
class Mesh:
    """Devices in a grid with named axes, in the order of their numbers; `hosts` has the process of each."""

    axes: dict[str, int]
    hosts: Sequence[int]

    def places(self, shape: Sequence[int], spec: Spec) -> list[tuple[int, Box]]:
        """By device: which copy of which part it has. Parts but the last are equally long, as GSPMD cuts."""
        free = [axis for axis in self.axes if axis not in spec]
        found = []
        for device in range(len(self.hosts)):
            at = dict(zip(self.axes, np.unravel_index(device, tuple(self.axes.values())), strict=True))
            copy = 0
            for axis in free:
                copy = copy * self.axes[axis] + int(at[axis])
            box = []
            for size, axis in zip(shape, spec, strict=True):
                length = -(-size // self.axes[axis]) if axis else size
                start = min(size, length * int(at[axis])) if axis else 0
                box.append(slice(start, min(size, start + length)))
            found.append((copy, tuple(box)))
        return found

    def tensor(self, name: str, whole: Tensor, spec: Spec, host: int) -> tuple[SpreadTensor, "HostParts"]:
        """What a host has of `whole`."""
        places = [
            place for place, of in zip(self.places(whole.shape, spec), self.hosts, strict=True) if of == host
        ]
        copies = math.prod(size for axis, size in self.axes.items() if axis not in spec)
        parts = HostParts(copies, places, [whole[box].clone() for _, box in places])
        return SpreadTensor(whole.shape, whole.dtype, parts, name), parts


class HostParts:
    """`spread_tensors.DeviceParts` in the memory of the host."""

    def __init__(self, copies: int, places: Sequence[tuple[int, Box]], held: list[Tensor]) -> None:
        self._copies, self._places = copies, places
        self.held = held
        self.reads = self.writes = 0

    def copies(self) -> int:
        return self._copies

    def places(self) -> Sequence[tuple[int, Box]]:
        return self._places

    def read(self) -> Sequence[Tensor]:
        self.reads += 1
        return [part.clone() for part in self.held]

    def write(self, parts: Sequence[Tensor]) -> None:
        self.writes += 1
        for held, part in zip(self.held, parts, strict=True):
            assert held.shape == part.shape
            held.copy_(part)

    def is_as(self, whole: Tensor) -> bool:
        return all(
            torch.equal(held, whole[box]) for (_, box), held in zip(self._places, self.held, strict=True)
        )


# 4 hosts with 4 of 16 devices each, in rows of a torus as on a pod: their numbers do not follow each other.
TORUS = [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
MESHES = {
    "rows": Mesh({"data": 2, "expert": 4, "model": 2}, [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4),
    "torus": Mesh({"data": 2, "expert": 4, "model": 2}, TORUS),
    "torus, experts over all": Mesh({"data": 1, "expert": 8, "model": 2}, TORUS),
    "one host": Mesh({"data": 2, "expert": 4, "model": 2}, [0] * 16),
}
# Shapes that the axes cut evenly, unevenly and into fewer parts than there are devices.
TENSORS: dict[str, tuple[tuple[int, ...], Spec]] = {
    "model/experts.wi": ((8, 2, 6, 10), ("expert", None, None, "model")),
    "model/experts.wo": ((8, 10, 6), ("expert", "model", None)),
    "model/few.experts": ((3, 5), ("expert", "model")),
    "model/embedding": ((7, 6), ("model", None)),
    "model/norm": ((6,), (None,)),
    "model/scalar": ((), ()),
    "model/rows": ((5, 3), ("data", None)),
}
