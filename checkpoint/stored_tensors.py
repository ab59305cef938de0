"""The tensors of a checkpoint read a part at a time, whatever number of processes wrote it."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from openmoe.checkpoint.errors import CheckpointError
from openmoe.checkpoint.manifest import Manifest
from openmoe.checkpoint.pieces import Piece, fault_in
from openmoe.checkpoint.tensor_files import StoredTensor, TensorParts, read_header, row_ranges


class CheckpointTensors:
    """Looks up tensors by their logical names ("model/embedding.weight")."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Raises CheckpointError where the files do not hold each element exactly once."""
        self.folder = folder
        self.manifest = manifest
        self._pieces: dict[str, list[tuple[Piece, StoredTensor]]] = {name: [] for name in manifest.tensors}
        for file in sorted(name for name in manifest.files if name.endswith(".safetensors")):
            metadata, stored = read_header(folder / file)
            places = json.loads(metadata.get("DCP_SHARDING_INFO", "{}"))
            for name, tensor in stored.items():
                offsets = places[name]["saved_offsets"] if name in places else [0] * len(tensor.shape)
                if name not in self._pieces:
                    raise CheckpointError(f"{folder / file}: tensor {name} is not in the manifest")
                self._pieces[name].append((Piece(offsets, tensor.shape), tensor))
        for name, pieces in self._pieces.items():
            fault = fault_in(manifest.tensors[name].shape, [piece for piece, _ in pieces])
            if fault:
                raise CheckpointError(f"{folder}: tensor {name} is not stored exactly once: {fault}")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.manifest.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        found = getattr(torch, self.manifest.tensors[name].dtype)
        assert isinstance(found, torch.dtype)
        return found

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """Elements first .. stop of a tensor's first axis."""
        shape = self.shape(name)
        out = torch.empty(stop - first, *shape[1:], dtype=self.dtype(name))
        for piece, stored in self._pieces[name]:
            begin = max(first, piece.offsets[0])
            end = min(stop, piece.offsets[0] + piece.sizes[0])
            if begin < end and out.numel():
                part = stored.rows(begin - piece.offsets[0], end - piece.offsets[0])
                into = out[begin - first : end - first]
                for dim in range(1, len(shape)):
                    into = into.narrow(dim, piece.offsets[dim], piece.sizes[dim])
                into.copy_(part)
        return out

    def parts(self, name: str, one_by_one: bool = False) -> TensorParts:
        """The tensor in parts, or in those of one element of its first axis each."""
        shape, dtype = self.shape(name), self.dtype(name)

        def read() -> Iterator[Tensor]:
            if not shape:
                raise CheckpointError(f"{self.folder}: tensor {name} is a scalar")
            ranges = (
                ((i, i + 1) for i in range(shape[0])) if one_by_one else row_ranges(shape, dtype.itemsize)
            )
            for first, stop in ranges:
                yield self.rows(name, first, stop)

        return TensorParts(name, dtype, shape, read)
