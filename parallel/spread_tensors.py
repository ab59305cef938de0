"""A tensor in parts over many devices of each process (XLA), as checkpoints write it and fill it.

Torch knows no such tensor: under SPMD it is one that has no parts. Here it is a tensor without data that
says, by the protocol of torch.distributed.checkpoint, which boxes of it this process writes and needs.

Every part has as many copies, over all devices of all hosts, and one is written. Which one follows from the
tensor's name: so each process knows by itself what it has to write, and copies no more to its host. Over many
tensors all hosts have about as much.
"""

import math
import zlib
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[slice, ...]  # by dimension, start and stop within the whole tensor


class DeviceParts(Protocol):
    """What the devices of this process hold of one tensor."""

    def copies(self) -> int:
        """Of each part, on all devices of all processes."""

    def places(self) -> Sequence[tuple[int, Box]]:
        """By device of this process: which copy it has (from 0), of which part."""

    def read(self) -> Sequence[Tensor]:
        """Copies of their parts on the host, by device, in the order of `places`."""

    def write(self, parts: Sequence[Tensor]) -> None:
        """Host tensors into the devices, in the order of `places`."""


class SpreadTensor(Tensor):
    """The whole of what `parts` are parts of. Has shape and dtype and no data; operations are an error."""

    _parts: DeviceParts
    _places: Sequence[tuple[int, Box]]
    _copy: int  # that is written
    _filling: dict[tuple[int, ...], Tensor]  # by the offsets of a box
    _elements_missing: int

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, parts: DeviceParts, name: str
    ) -> "SpreadTensor":
        whole = cast(SpreadTensor, Tensor._make_wrapper_subclass(cls, shape, dtype=dtype))
        whole._parts = parts
        whole._copy = zlib.crc32(name.encode()) % parts.copies()
        whole._places = parts.places()  # now: a save may ask for them in another thread
        whole._filling = {}
        whole._elements_missing = whole._elements_here()
        return whole

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} of a tensor over many devices: it is for checkpoints only")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SpreadTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    @property
    def bytes_here(self) -> int:
        """Of all that this process's devices hold, each part once."""
        return self._elements_here() * self.dtype.itemsize

    def written_here(self) -> dict[tuple[int, ...], Tensor]:
        """Copies on the host of the boxes that this process is to write, by their offsets."""
        boxes = self._written_boxes()
        if not boxes:
            return {}
        read = [
            (box, part)
            for (copy, box), part in zip(self._places, self._parts.read(), strict=True)
            if copy == self._copy
        ]
        return {_offsets(box): _put_together(box, read) for box in boxes}

    def filled(self, elements: int) -> None:
        """So many more elements are in what `__get_tensor_shard__` gave; with the last the devices get
        theirs."""
        self._elements_missing -= elements
        if self._elements_missing == 0:
            boxes = [(box, self._filling[_offsets(box)]) for box in self._boxes_here()]
            self._parts.write([_cut_out(place, boxes) for _, place in self._places])
            self._filling = {}
            self._elements_missing = self._elements_here()

    def _elements_here(self) -> int:
        return sum(map(_elements, self._boxes_here()))

    def _boxes_here(self) -> list[Box]:
        return merged([box for _, box in self._places])

    def _written_boxes(self) -> list[Box]:
        return merged([box for copy, box in self._places if copy == self._copy])

    # What torch.distributed.checkpoint asks of a tensor that it does not know.

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(dtype=self.dtype), self.size()),
            )
            for chunk in map(_chunk, self._written_boxes())
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box in self._boxes_here()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        """A host buffer for one of the chunks, which lasts until all are full."""
        offsets = tuple(index.offset or ())
        if offsets not in self._filling:
            box = next(box for box in self._boxes_here() if _offsets(box) == offsets)
            self._filling[offsets] = torch.empty(_sizes(box), dtype=self.dtype)
        return self._filling[offsets]


def merged(boxes: Sequence[Box]) -> list[Box]:
    """The same elements in fewer boxes, in the order of their offsets: neighbours that differ in one
    dimension alone become one. The boxes are equal or disjoint; empty ones are left out."""
    found = {tuple((side.start, side.stop) for side in box) for box in boxes if _elements(box)}
    for dim in range(len(boxes[0]) if boxes else 0):
        runs: dict[
            Any, list[list[int]]
        ] = {}  # by the other dimensions: where runs in this one start and stop
        for box in sorted(found):
            of_others = runs.setdefault((box[:dim], box[dim + 1 :]), [])
            if of_others and of_others[-1][1] == box[dim][0]:
                of_others[-1][1] = box[dim][1]
            else:
                of_others.append(list(box[dim]))
        found = {(*left, (start, stop), *right) for (left, right), of in runs.items() for start, stop in of}
    return [tuple(slice(*side) for side in box) for box in sorted(found)]


def _put_together(box: Box, parts: Sequence[tuple[Box, Tensor]]) -> Tensor:
    """The box's elements from those of `parts` that lie in it and fill it."""
    inside = [(place, part) for place, part in parts if _elements(place) and _lies_in(place, box)]
    if len(inside) == 1:
        return inside[0][1].contiguous()
    whole = torch.empty(_sizes(box), dtype=parts[0][1].dtype)
    for place, part in inside:
        whole[_within(place, box)] = part
    return whole


def _cut_out(place: Box, boxes: Sequence[tuple[Box, Tensor]]) -> Tensor:
    if not _elements(place):
        return torch.empty(_sizes(place), dtype=boxes[0][1].dtype)
    box, values = next((box, values) for box, values in boxes if _lies_in(place, box))
    return values[_within(place, box)].contiguous()


def _lies_in(inner: Box, outer: Box) -> bool:
    return all(b.start <= a.start and a.stop <= b.stop for a, b in zip(inner, outer, strict=True))


def _within(inner: Box, outer: Box) -> Box:
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(inner, outer, strict=True))


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(_offsets(box)), torch.Size(_sizes(box)))


def _offsets(box: Box) -> tuple[int, ...]:
    return tuple(side.start for side in box)


def _sizes(box: Box) -> tuple[int, ...]:
    return tuple(side.stop - side.start for side in box)


def _elements(box: Box) -> int:
    return math.prod(_sizes(box))
