"""Tensors over many devices: what each process writes of them, and what it makes of what it reads."""

import random
from itertools import pairwise

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from openmoe.checkpoint.pieces import Piece, fault_in
from openmoe.parallel.spread_tensors import Box, SpreadTensor, merged
from tests.distributed.device_parts import MESHES, TENSORS, Mesh


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("name", TENSORS)
def test_hosts_write_each_element_once(mesh: Mesh, name: str) -> None:
    """Bugs: copies of a part written by several hosts, or by none (tensors cut over some axes and copied over
    others are what torch_xla's own planner leaves out); a part at another's place."""
    shape, spec = TENSORS[name]
    whole = torch.randn(shape)
    pieces = []
    for host in set(mesh.hosts):
        tensor, parts = mesh.tensor(name, whole, spec, host)
        boxes = tensor.written_here()
        items = tensor.__create_write_items__(name, tensor)
        assert [tuple(item.tensor_data.chunk.offsets) for item in items] == list(boxes)
        assert parts.reads == bool(boxes), "a host copies what it does not write"
        for offsets, part in boxes.items():
            pieces.append(Piece(offsets, part.shape))
            box = tuple(slice(start, start + size) for start, size in zip(offsets, part.shape, strict=True))
            assert torch.equal(part, whole[box])
    assert fault_in(shape, pieces) is None
    if mesh is MESHES["one host"]:
        assert len(pieces) == 1, "more files than a run of one process has"


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("name", TENSORS)
def test_devices_get_theirs_once_all_is_read(mesh: Mesh, name: str) -> None:
    """Bugs: a copy that stays as it was; a part of another device; a tensor handed over half read."""
    shape, spec = TENSORS[name]
    whole = torch.randn(shape)
    for host in set(mesh.hosts):
        tensor, parts = mesh.tensor(name, torch.zeros(shape), spec, host)
        for _ in range(2):  # it can be filled again
            before = parts.writes
            for chunk in tensor.__create_chunk_list__():
                assert parts.writes == before
                buffer = tensor.__get_tensor_shard__(MetadataIndex(name, chunk.offsets))
                place = zip(chunk.offsets, chunk.sizes, strict=True)
                buffer.copy_(whole[tuple(slice(start, start + size) for start, size in place)])
                tensor.filled(buffer.numel())
            assert parts.writes == before + (tensor.bytes_here > 0)
            assert parts.is_as(whole)
            whole = whole + 1


def test_hosts_have_about_as_much_to_write() -> None:
    """Bug: the first host writes all that has copies on every host: 25 of 140 GB of 34B, on 32 hosts."""
    mesh, whole = MESHES["torus"], torch.zeros(6, 10)
    written = [
        sum(
            mesh.tensor(f"layers.{i}.attention.wq", whole, (None, "model"), host)[0].written_here() != {}
            for i in range(64)
        )
        for host in range(4)
    ]
    assert min(written) > 64 / 4 / 2, written


def test_boxes_are_merged() -> None:
    """Bugs: a hole is filled; neighbours in one dimension that differ in another become one."""
    draw = random.Random(0)
    for _ in range(200):
        cuts = [sorted({0, size, *draw.sample(range(size), 2)}) for size in (7, 5, 6)]
        cells: list[Box] = [()]
        for ends in cuts:
            cells = [(*box, slice(a, b)) for box in cells for a, b in pairwise(ends)]
        kept = draw.sample(cells, draw.randint(0, len(cells)))
        covered = torch.zeros(7, 5, 6, dtype=torch.int64)
        for box in merged(kept):
            covered[box] += 1
        expected = torch.zeros(7, 5, 6, dtype=torch.int64)
        for box in kept:
            expected[box] = 1
        assert torch.equal(covered, expected)
        assert len(merged(cells)) == 1


def test_it_is_no_tensor_to_compute_with() -> None:
    """Bug: zeros, or whatever the memory holds, where somebody takes it for an ordinary tensor."""
    tensor, _ = MESHES["rows"].tensor("x", torch.ones(4, 4), (None, "model"), 0)
    assert isinstance(tensor, SpreadTensor)
    with pytest.raises(NotImplementedError, match="for checkpoints only"):
        tensor + 1
    assert "SpreadTensor(shape=(4, 4)" in repr(tensor)
