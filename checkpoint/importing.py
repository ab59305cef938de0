"""Weights of others as a checkpoint of ours: the released format, openmoe-pt's, and flat t5x tensors.

All of it is looked through before anything is written. Memory holds one part of a tensor, at most one expert;
of t5x, which keeps every matrix the other way round, one tensor.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from openmoe.checkpoint.errors import CheckpointError
from openmoe.checkpoint.export import INDEX_NAME, TOKENIZER_NAME
from openmoe.checkpoint.names import TensorName, openmoe_pt_name, tensor_names
from openmoe.checkpoint.released_config import CONFIG_NAME, Provenance, read_json
from openmoe.checkpoint.tensor_files import DTYPES, StoredTensor, TensorParts, read_header, row_ranges
from openmoe.data.shards import TOKENIZER
from openmoe.data.tokenizer import Tokenizer, read_model
from openmoe.model.config import ModelConfig

SINGLE_NAME = "model.safetensors"
# What zipfile, zlib and numpy raise at a file that is not as they wrote it; RuntimeError: it is encrypted, or
# compressed in a way that they don't know.
_DAMAGE = (ValueError, BadZipFile, zlib.error, EOFError, RuntimeError)


@dataclass(frozen=True)
class Foreign:
    """A model as found elsewhere, and how to read it as ours."""

    format: str
    provenance: Provenance
    tensors: list[TensorParts]  # under our logical names, float32 or float64
    other_files: dict[str, bytes]


def open_released(folder: Path) -> Foreign:
    """A folder in the released format, or with openmoe-pt's names for the experts.

    Raises CheckpointError naming the file, or the tensor, that is missing, cut short, foreign or of another
    shape.
    """
    provenance = read_json(folder / CONFIG_NAME)
    found = _stored_in(folder)
    names = list(tensor_names(provenance.model))
    is_openmoe_pt = any(".mlp.experts.0." in name for name in found)
    expected: dict[str, tuple[int, ...]] = {}
    tensors = []
    for name in names:
        read = _from_openmoe_pt(name) if is_openmoe_pt else _from_released(name)
        for foreign, shape in read.shapes.items():
            _require(folder, found, foreign, shape)
        expected |= read.shapes
        tensors.append(read.as_ours(found))
    for foreign in sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"{found[foreign].path}: tensor {foreign}: config.json's model has none of that name"
        )
    files = {}
    path = folder / TOKENIZER_NAME
    if path.exists():
        tokenizer = Tokenizer(read_model(str(path), "weights"), str(path))
        if tokenizer.size > provenance.model.vocab_size:
            raise CheckpointError(
                f"{path}: {tokenizer.size} ids with its sentinels, and the model's "
                f"vocabulary has {provenance.model.vocab_size} rows"
            )
        files[TOKENIZER] = tokenizer.model
    return Foreign("openmoe_pt" if is_openmoe_pt else "released", provenance, tensors, files)


def open_t5x(path: Path, provenance: Provenance) -> Foreign:
    """Tensors under their flax paths, "decoder/layers_0/mlp/wi_0/kernel", in one .npz or .safetensors file.

    Raises CheckpointError like `open_released`.
    """
    arrays = _arrays(path)
    tensors = []
    names = list(tensor_names(provenance.model))
    for name in names:
        if name.t5x not in arrays:
            raise CheckpointError(f"{path}: tensor {name.t5x}: missing")
        tensors.append(_from_t5x(path, name, arrays[name.t5x]))
    for foreign in sorted(arrays.keys() - {name.t5x for name in names}):
        raise CheckpointError(f"{path}: tensor {foreign}: the model has none of that name")
    return Foreign("t5x", provenance, tensors, {})


@dataclass(frozen=True)
class _Reading:
    """How one of our tensors is read from foreign ones of these names and shapes."""

    name: TensorName
    shapes: dict[str, tuple[int, ...]]
    parts: Callable[[list[StoredTensor]], Iterator[Tensor]]

    def as_ours(self, found: Mapping[str, StoredTensor]) -> TensorParts:
        stored = [found[foreign] for foreign in self.shapes]
        dtype = torch.float64 if stored[0].dtype == torch.float64 else torch.float32
        return TensorParts(
            f"model/{self.name.ours}",
            dtype,
            self.name.shape,
            lambda: (part.to(dtype) for part in self.parts(stored)),
        )


def _from_released(name: TensorName) -> _Reading:
    def parts(stored: list[StoredTensor]) -> Iterator[Tensor]:
        (tensor,) = stored
        if not name.is_of_experts:
            yield from (tensor.rows(*rows) for rows in row_ranges(tensor.shape, tensor.dtype.itemsize))
            return
        for expert in range(tensor.shape[0]):
            yield name.from_format("released", tensor.rows(expert, expert + 1)).contiguous()

    return _Reading(name, {name.released: name.shape_in("released")}, parts)


def _from_openmoe_pt(name: TensorName) -> _Reading:
    """There an expert's matrices are `[out, in]`, as ours: the bytes stay in their order."""
    foreign = openmoe_pt_name(name.released)
    names = [foreign]
    shape = name.shape_in("released")
    if name.is_of_experts:
        names = [foreign.format(e=expert) for expert in range(shape[0])]
        shape = (shape[2], shape[1])

    def parts(stored: list[StoredTensor]) -> Iterator[Tensor]:
        for tensor in stored:
            yield from (tensor.rows(*rows) for rows in row_ranges(tensor.shape, tensor.dtype.itemsize))

    return _Reading(name, dict.fromkeys(names, shape), parts)


def _from_t5x(path: Path, name: TensorName, read: Callable[[], Tensor]) -> TensorParts:
    first = read()
    _require_floats(path, name.t5x, first.dtype)
    if tuple(first.shape) != name.shape_in("t5x"):
        raise CheckpointError(
            f"{path}: tensor {name.t5x}: shape {list(first.shape)}, the model's is "
            f"{list(name.shape_in('t5x'))}"
        )
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    del first
    return TensorParts(
        f"model/{name.ours}",
        dtype,
        name.shape,
        lambda: iter([name.from_format("t5x", read()).to(dtype).contiguous()]),
    )


def _stored_in(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder by their names, those of the index where there is one."""
    index = folder / INDEX_NAME
    if not index.exists():
        if not (folder / SINGLE_NAME).exists():
            pickles = ", ".join(path.name for path in sorted(folder.glob("*.bin"))[:1])
            hint = f"; {pickles} is a pickle, which is not read" if pickles else ""
            raise CheckpointError(f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} there{hint}")
        return read_header(folder / SINGLE_NAME)[1]
    try:
        weight_map = dict(json.loads(index.read_bytes())["weight_map"])
    except OSError as error:
        raise CheckpointError(f"{index}: can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{index}: damaged: no index of tensors") from None
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(map(str, weight_map.values()))):
        if Path(file).name != file:
            raise CheckpointError(f"{index}: {file}: no file of this folder")
        for name, stored in read_header(folder / file)[1].items():
            if weight_map.get(name) != file:
                raise CheckpointError(f"{folder / file}: tensor {name}: the index does not place it there")
            found[name] = stored
    for name in sorted(weight_map.keys() - found.keys()):
        raise CheckpointError(
            f"{folder / weight_map[name]}: tensor {name}: missing, the index places it there"
        )
    listed = set(map(str, weight_map.values()))
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in listed:
            raise CheckpointError(f"{path}: foreign: the index does not name it")
    return found


def _require(folder: Path, found: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...]) -> None:
    if name not in found:
        raise CheckpointError(f"{folder}: tensor {name}: missing")
    stored = found[name]
    if stored.shape != shape:
        raise CheckpointError(
            f"{stored.path}: tensor {name}: shape {list(stored.shape)}, config.json's is {list(shape)}"
        )
    _require_floats(stored.path, name, stored.dtype)


def _require_floats(path: Path, name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES.values():
        raise CheckpointError(f"{path}: tensor {name}: {dtype}: allowed {', '.join(DTYPES)}")


def _arrays(path: Path) -> dict[str, Callable[[], Tensor]]:
    """A reader for each tensor of a flat file."""
    if path.suffix == ".safetensors":
        return {
            name: (lambda stored=stored: stored.whole())  # type: ignore[misc]
            for name, stored in read_header(path)[1].items()
        }
    try:
        archive = np.load(path, allow_pickle=False)
        names = list(archive.files)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from None
    except (*_DAMAGE, AttributeError):
        raise CheckpointError(f"{path}: damaged: allowed a .npz or a .safetensors file") from None

    def read(name: str) -> Tensor:
        try:
            return torch.from_numpy(np.ascontiguousarray(archive[name]))
        except (*_DAMAGE, OSError, TypeError) as error:
            raise CheckpointError(f"{path}: tensor {name}: damaged: {error}") from None

    return {name: (lambda name=name: read(name)) for name in names}  # type: ignore[misc]


def model_for_t5x(config: ModelConfig) -> None:
    """Raises CheckpointError where the table of names has no such model."""
    if config.moe_layers and config.residual != "sequential":
        raise CheckpointError(f"model.residual={config.residual}: t5x has no such models; allowed sequential")
    if config.tied_head:
        raise CheckpointError("model.tied_head=true: t5x has no such models here; allowed false")
