"""Checkpoints that several processes write and read together, under one layout and another."""

import hashlib
import json
import os
import pickle
import resource
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from openmoe.checkpoint import shards, storage
from openmoe.checkpoint.config import CheckpointConfig
from openmoe.checkpoint.errors import CheckpointError, CheckpointWriteError
from openmoe.checkpoint.files import FileEntry
from openmoe.checkpoint.manager import CheckpointManager, load_checkpoint, steps
from openmoe.checkpoint.manifest import MANIFEST_NAME, read_manifest
from openmoe.checkpoint.state import training_tensors
from openmoe.checkpoint.storage import read_checkpoint, verify_checkpoint, write_checkpoint
from openmoe.checkpoint.together import ALL, Peers
from openmoe.model.config import ModelConfig
from openmoe.optim.build import build_optimizer, state_dims
from openmoe.optim.config import AdafactorConfig, AdamWConfig
from openmoe.parallel.build import build
from openmoe.parallel.config import ParallelConfig
from openmoe.parallel.ranks import ShardedRanks
from openmoe.parallel.topology import Topology
from tests.distributed.pool import Pool

CPU = torch.device("cpu")
# Sizes that 3 and 8 ranks can't share evenly in any dimension, and fewer experts than ranks: some hold none.
MODEL = ModelConfig(
    vocab_size=164,
    d_model=140,
    n_layers=2,
    n_heads=2,
    head_dim=10,
    d_ff=130,
    ffn="swiglu4",
    moe_every=2,
    num_experts=4,
    top_k=2,
)
IDENTITY = MODEL.model_dump()
OPTIMIZERS = {"adafactor": AdafactorConfig(name="adafactor"), "adamw": AdamWConfig(name="adamw")}

LAYOUTS = {
    "alone": None,  # without a process group
    "one": Topology(1, 1, 1, 1, 1),
    "shard2": Topology(2, 1, 2, 1, 1),
    "replicate2": Topology(2, 2, 1, 1, 1),
    "shard3": Topology(3, 1, 3, 1, 1),
    "shard2-tensor2-expert4": Topology(4, 1, 2, 2, 4),
    "replicate2-shard2-expert2": Topology(4, 2, 2, 1, 2),
    "shard8": Topology(8, 1, 8, 1, 1),
    "shard4-tensor2-expert4": Topology(8, 1, 4, 2, 4),
    "replicate2-shard2-tensor2-expert2": Topology(8, 2, 2, 2, 2),
}


def values(name: str, shape: Sequence[int]) -> Tensor:
    """What the whole tensor of this name has, and no other has."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


class Training:
    """A model and its optimizer, on one rank of a layout or alone."""

    def __init__(self, layout: str, optimizer: str) -> None:
        topology = LAYOUTS[layout] or Topology(1, 1, 1, 1, 1)
        self.model, self.ranks = build(MODEL, ParallelConfig(), topology, "fp32", CPU, seed=0)
        self.optimizer = build_optimizer(
            OPTIMIZERS[optimizer], self.ranks.named_parameters(), self.ranks.shards
        )
        self.topology = topology
        self.tensors = training_tensors(self.model, self.optimizer, self.ranks)

    def parts(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name of each tensor, the live part of it that is here, and what it should be: taken from the
        tables of the layout, of which the checkpoint knows nothing."""
        dims = state_dims(self.optimizer)
        for name, parameter in self.ranks.named_parameters():
            if isinstance(self.ranks, ShardedRanks):
                layout = self.ranks.layouts[name]
                shape, part = layout.shape, layout.slices(self.topology, self.ranks.rank)
            else:
                shape, part = tuple(parameter.shape), (slice(None),) * parameter.dim()
            kept = {f"model/{name}": (parameter.detach(), tuple(range(len(shape))))} | {
                f"optimizer/{name}/{key}": (value, dims[name][key])
                for key, value in self.optimizer.state[parameter].items()
            }
            for full_name, (live, of) in kept.items():
                whole = values(full_name, [shape[dim] for dim in of])
                yield full_name, live, whole[tuple(part[dim] for dim in of)]

    def fill(self) -> None:
        for _, live, wanted in self.parts():
            live.copy_(wanted)

    def spoil(self) -> None:
        for _, live, _ in self.parts():
            live.fill_(-1)

    def wrong(self) -> list[str]:
        return [name for name, live, wanted in self.parts() if not torch.equal(live, wanted)]

    def spoilt(self) -> bool:
        return all(bool((live == -1).all()) for _, live, _ in self.parts())


def write(folder: Path, tensors: dict[str, Tensor], step: int = 1) -> None:
    counts = {"step": step, "tokens_seen": step, "milestone": False}
    write_checkpoint(folder, tensors, **counts, model=IDENTITY, metadata={"from": "rank 0"})


def pass_on(layout: str, optimizer: str, given: Path | None, to: Path, file_bytes: int) -> list[str]:
    """Loads `given`, or makes the values where there is none, and writes them `to`; returns what is wrong."""
    training = Training(layout, optimizer)
    generator = torch.Generator().manual_seed(77).get_state()
    wrong = []
    if given is None:
        training.fill()
        training.tensors["rng/torch_cpu"].copy_(generator)
    else:
        training.spoil()
        manifest = load_checkpoint(given, training.tensors, IDENTITY)
        wrong = training.wrong()
        if manifest.metadata != {"from": "rank 0"}:
            wrong.append("metadata")
        if not torch.equal(training.tensors["rng/torch_cpu"], generator):
            wrong.append("rng")
    storage.FILE_BYTES = file_bytes
    write(to, training.tensors, int(to.name.removeprefix("step_")))
    return wrong


def run(pool: Pool, layout: str, *args: Any) -> list[Any]:
    topology = LAYOUTS[layout]
    if topology is None:
        return [pass_on(layout, *args)]
    return pool.run(pass_on, topology.world_size, layout, *args, timeout_seconds=120)


CHAINS = {
    # Ordered pairs of 1, 2, 3, 4 and 8 ranks, each neighbours in one chain, with HSDP at both ends of a pair.
    "adafactor": [
        "shard4-tensor2-expert4",
        "alone",
        "shard8",
        "shard3",
        "replicate2-shard2-tensor2-expert2",
        "one",
        "shard2-tensor2-expert4",
        "shard2",
        "replicate2-shard2-expert2",
        "alone",
    ],
    "adamw": ["alone", "shard2-tensor2-expert4", "shard3", "replicate2", "alone"],
}


@pytest.mark.parametrize("optimizer", CHAINS)
def test_what_one_layout_writes_another_reads_to_the_last_bit(
    optimizer: str, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches parts that land elsewhere, uneven or empty parts that are lost or take the place of others, a
    state that is taken for the wrong dimensions of its parameter, copies that are written several times."""
    monkeypatch.setattr(storage, "FILE_BYTES", storage.FILE_BYTES)  # which `pass_on` sets, here too
    given = None
    sizes: set[int] = set()
    for number, layout in enumerate(CHAINS[optimizer]):
        folder = tmp_path / f"step_{number}"
        file_bytes = 2**30 if number % 2 else 200_000
        wrong = run(pool, layout, optimizer, given, folder, file_bytes)
        assert wrong == [[]] * len(wrong), f"{given and CHAINS[optimizer][number - 1]} -> {layout}"
        sizes.add(sum(map(data_bytes, folder.glob("*.safetensors"))))
        given = folder
    training = Training("alone", optimizer)
    assert sizes == {sum(tensor.nbytes for tensor in training.tensors.values())}


def data_bytes(file: Path) -> int:
    return file.stat().st_size - 8 - int.from_bytes(file.open("rb").read(8), "little")


def test_each_rank_writes_its_share_in_files_of_limited_size(pool: Pool, tmp_path: Path) -> None:
    """Catches one rank that writes all that several hold, and files as large as the model."""
    run(pool, "replicate2-shard2-expert2", "adafactor", None, tmp_path / "step_1", 300_000)
    shares: dict[str, int] = {}
    for file in (tmp_path / "step_1").glob("*.safetensors"):
        rank = file.name.split("-")[1]
        shares[rank] = shares.get(rank, 0) + data_bytes(file)
    assert len(shares) == 4
    assert max(shares.values()) < 0.4 * sum(shares.values())
    largest = max(data_bytes(file) for file in (tmp_path / "step_1").glob("*.safetensors"))
    largest_part = 2 * 2 * 130 * 140 * 4 // 2  # two experts' wi_0 in float32, over two ranks
    assert largest <= 300_000 + largest_part


def parts_by_torch_and_by_the_tables(layout: str) -> list[str]:
    training = Training(layout, "adafactor")
    wrong = []
    for name, parameter in training.ranks.named_parameters():
        whole = training.ranks.as_whole(name, parameter.detach(), range(parameter.dim()))
        assert isinstance(training.ranks, ShardedRanks)
        part = training.ranks.layouts[name].slices(training.topology, training.ranks.rank)
        if not isinstance(whole, DTensor):
            shape, offset = tuple(whole.shape), (0,) * whole.dim()
        else:
            spec = whole.shape, whole.device_mesh, whole.placements
            shape, offset = compute_local_shape_and_global_offset(*spec)
        table = [(dim.start, dim.stop) for dim in part]
        if parameter.numel() and table != [(at, at + n) for at, n in zip(offset, shape, strict=True)]:
            wrong.append(f"{name}: {table} in the table, {shape} at {offset} by torch")
        if tuple(shape) != tuple(parameter.shape):
            wrong.append(f"{name}: {tuple(parameter.shape)} here, {shape} by torch")
        if isinstance(whole, DTensor) and whole.to_local().data_ptr() != parameter.data_ptr():
            wrong.append(f"{name}: a copy")
    return wrong


@pytest.mark.parametrize("layout", ["shard3", "shard4-tensor2-expert4", "shard8"])
def test_torch_and_the_tables_cut_alike(layout: str, pool: Pool) -> None:
    """Catches a mesh whose axes are in another order than they cut."""
    topology = LAYOUTS[layout]
    assert topology is not None
    for wrong in pool.run(parts_by_torch_and_by_the_tables, topology.world_size, layout):
        assert wrong == []


def transposed_part(folder: Path) -> bool:
    mesh = init_device_mesh("cpu", (2,))
    whole = values("model/a", (6, 4))
    local = whole[3 * dist.get_rank() :][:3].T.contiguous().T
    assert not local.is_contiguous()
    tensor = DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )
    write(folder, {"model/a": tensor})
    local.fill_(-1)
    load_checkpoint(folder, {"model/a": tensor}, IDENTITY)
    found = torch.zeros(6, 4)
    load_checkpoint(folder, {"model/a": found}, IDENTITY)
    return torch.equal(local, whole[3 * dist.get_rank() :][:3]) and torch.equal(found, whole)


def test_a_part_that_is_not_contiguous(pool: Pool, tmp_path: Path) -> None:
    """Catches a part that is refused, or written in the order of its memory."""
    assert pool.run(transposed_part, 2, tmp_path / "step_1") == [True, True]


# --- what goes wrong on one rank


def no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@contextmanager
def small_files_only() -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@contextmanager
def failing(module: Any, name: str, by: Callable[..., Any] = no_space) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, by)
        yield


class CannotBeSent(Exception):
    def __init__(self, one: object, two: object) -> None:
        super().__init__(f"{one} {two}")


def raise_what_cannot_be_sent(*_: object) -> None:
    raise CannotBeSent(1, lambda: 2)


FAULTS = {
    "tensors": small_files_only,
    "sync": lambda: failing(os, "fsync"),
    "manifest": lambda: failing(storage, "write_file"),
    "commit": lambda: failing(os, "rename"),
    "folder": lambda: failing(Path, "mkdir"),
    "bug": lambda: failing(shards, "encode", raise_what_cannot_be_sent),
}


def save_with_fault(run_dir: Path, fault: str, guilty: int) -> tuple[str, str, list[str]]:
    """Saves step 1, fails in step 2, saves step 3; returns the error, and the folders after it and at the
    end."""
    training = Training("shard3", "adafactor")
    training.fill()
    manager = CheckpointManager(run_dir, CheckpointConfig(keep=2))
    error = ""
    for step in (1, 2, 3):
        counts = {"step": step, "tokens_seen": step, "milestone": False, "model": IDENTITY, "metadata": {}}
        if step != 2:
            manager.save(training.tensors, **counts)
            manager.finish()
            continue
        try:
            with FAULTS[fault]() if dist.get_rank() == guilty else nullcontext():
                manager.save(training.tensors, **counts)
                manager.finish()
        except (CheckpointWriteError, RuntimeError) as raised:
            error = f"{type(raised).__name__}: {raised}"
        left = ALL.on_first(lambda: " ".join(sorted(path.name for path in manager.directory.iterdir())))
    for folder in steps(manager.directory):
        verify_checkpoint(folder)
    return error, left, [path.name for path in steps(manager.directory)]


@pytest.mark.parametrize(
    ("fault", "guilty", "says"),
    [
        ("tensors", 2, "File too large"),
        ("sync", 1, "No space left on device"),
        ("manifest", 0, "No space left on device"),
        ("commit", 0, "No space left on device"),
        ("folder", 0, "No space left on device"),
        ("bug", 1, "RuntimeError: CannotBeSent: 1 <function"),
    ],
)
def test_a_save_that_fails_on_one_rank_fails_on_all(
    fault: str, guilty: int, says: str, pool: Pool, tmp_path: Path
) -> None:
    """Catches ranks that wait for ever for one that failed, or think the checkpoint written; a leftover; an
    earlier checkpoint lost; processes that can't save the next one."""
    found = pool.run(save_with_fault, 3, tmp_path, fault, guilty)
    errors = [error for error, _, _ in found]
    assert errors == errors[:1] * 3
    assert says in errors[0]
    if fault != "bug":
        assert f"CheckpointWriteError: [Errno {27 if fault == 'tensors' else 28}]" in errors[0]
        assert f"the last one is whole: {tmp_path / 'checkpoints' / 'step_1'}" in errors[0]
    assert found[0][1:] == ("step_1", ["step_1", "step_3"])


def load_errors(folder: Path, wrong_rank: int | None) -> tuple[str, bool]:
    training = Training("shard3", "adafactor")
    training.spoil()
    identity = IDENTITY | {"d_model": 8} if dist.get_rank() == wrong_rank else IDENTITY
    try:
        load_checkpoint(folder, training.tensors, identity)
    except CheckpointError as error:
        return str(error), training.spoilt()
    return "", training.spoilt()


def save_steps(run_dir: Path) -> None:
    training = Training("shard3", "adafactor")
    training.fill()
    for step in (1, 2):
        write(run_dir / f"step_{step}", training.tensors, step)


@pytest.fixture(scope="module")
def written(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2 by three ranks."""
    folder = tmp_path_factory.mktemp("written")
    pool.run(save_steps, 3, folder)
    return folder


@pytest.fixture
def checkpoints(written: Path, tmp_path: Path) -> Path:
    """A copy of them, to be damaged."""
    return shutil.copytree(written, tmp_path / "copy")


@pytest.mark.parametrize("shard", [1, 2, 3])
def test_damage_is_found_by_all_ranks(shard: int, pool: Pool, checkpoints: Path) -> None:
    """Catches a rank that goes on with a checkpoint in which another has found a fault, and a file that
    falls to nobody."""
    file = next((checkpoints / "step_2").glob(f"shard-{shard:05d}-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = pool.run(load_errors, 3, checkpoints / "step_2", None)
    assert found == found[:1] * 3
    says, untouched = found[0]
    assert untouched
    assert f"{file}: damaged: its SHA-256 differs" in says
    assert says.endswith(f"use checkpoint.resume={checkpoints / 'step_1'}")


def test_a_rank_with_another_model_stops_all(pool: Pool, written: Path) -> None:
    """Catches ranks that wait in the load for one that has refused the checkpoint."""
    found = pool.run(load_errors, 3, written / "step_1", 2)
    assert found == found[:1] * 3
    assert "model.d_model is 140 in the checkpoint, 8 here" in found[0][0]
    assert found[0][1]


def restate(folder: Path) -> None:
    """Writes a manifest for the files that are there now."""
    manifest = read_manifest(folder)
    files = {
        path.name: FileEntry(
            size_bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in folder.glob("*.safetensors")
    }
    (folder / MANIFEST_NAME).write_text(manifest.model_copy(update={"files": files}).text())


def test_pieces_must_be_all_of_each_tensor_and_nothing_twice(pool: Pool, checkpoints: Path) -> None:
    """Catches a tensor that is filled in part, or from one of two pieces that differ."""
    lost, double = checkpoints / "step_1", checkpoints / "step_2"
    file = next(lost.glob("shard-00002-*"))
    file.unlink()
    shutil.copy(double / file.name, double / "shard-00009-model-00001-of-00001.safetensors")
    for folder, says in (
        (lost, "tensor model/embedding.weight is not stored exactly once: only 15260 of 22960 elements"),
        (double, "tensor model/embedding.weight is not stored exactly once: pieces [55:110, 0:140] and"),
    ):
        restate(folder)
        found = pool.run(load_errors, 3, folder, None)
        assert found == found[:1] * 3
        assert says in found[0][0]
        assert found[0][1]
        training = Training("alone", "adafactor")
        training.spoil()
        with pytest.raises(CheckpointError, match="is not stored exactly once"):
            read_checkpoint(folder, verify_checkpoint(folder), training.tensors, IDENTITY)
        assert training.spoilt()


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("for the first rank only")


def life_of_a_run(run_dir: Path) -> tuple[list[str], list[str]]:
    """Leftovers, saves, a resume at an older step; other ranks may neither rename nor delete."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank():
            for module, name in ((os, "rename"), (shutil, "rmtree"), (os, "fsync")):
                patch.setattr(module, name, forbidden)
        tensors = {"model/a": torch.ones(4)}
        manager = CheckpointManager(run_dir, CheckpointConfig(keep=2))
        for step in range(1, 5):
            counts = {"step": step, "tokens_seen": step, "milestone": step == 1}
            manager.save(tensors, **counts, model={}, metadata={})
        manager.finish()
        aside = manager.set_aside_newer(3)
    return [path.name for path in aside], sorted(path.name for path in manager.directory.iterdir())


def test_only_the_first_rank_renames_and_deletes(pool: Pool, tmp_path: Path) -> None:
    """Catches ranks that delete or rename what another one has already, or while one still writes."""
    (tmp_path / "checkpoints" / "step_9.partial").mkdir(parents=True)
    found = pool.run(life_of_a_run, 3, tmp_path)
    assert [aside for aside, _ in found] == [["step_4.stale"], [], []]
    assert found[0][1] == ["step_1", "step_3", "step_4.stale"]


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        time.sleep(2.5)
        return function(*args)

    return call


def save_and_load_slowly(folder: Path, slow_rank: int) -> bool:
    """One rank takes longer, at each of its turns, than the default group waits."""
    peers = Peers(dist.new_group(backend="gloo", timeout=timedelta(seconds=60)))
    _set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    tensors = {"model/a": torch.ones(4) * dist.get_world_size()}
    counts = {"step": 1, "tokens_seen": 1, "milestone": False}
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == slow_rank:
            for name in ("_make_empty", "_parts_here", "_compare_tensors"):
                patch.setattr(storage, name, slow(getattr(storage, name)))
            patch.setattr(shards, "write_file", slow(shards.write_file))
        write_checkpoint(folder, tensors, **counts, model={}, metadata={}, peers=peers)
        tensors["model/a"].zero_()
        load_checkpoint(folder, tensors, {}, peers)
    return bool((tensors["model/a"] == dist.get_world_size()).all())


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_a_rank_that_takes_long_is_waited_for(slow_rank: int, pool: Pool, tmp_path: Path) -> None:
    """Catches a wait in the group whose limit is there to notice a hang of the training."""
    assert pool.run(save_and_load_slowly, 2, tmp_path / "step_1", slow_rank) == [True, True]


# --- the ways of doing it together


def shares_of_work() -> tuple[list[int], list[int], int]:
    mine = list(ALL.dealt(range(7)))
    return mine, ALL.on_every(lambda: len(mine)), ALL.on_first(lambda: 10 + dist.get_rank())


def test_work_is_dealt_out_and_its_results_are_everywhere(pool: Pool) -> None:
    """Catches work that nobody or everybody does."""
    found = pool.run(shares_of_work, 3)
    assert sorted(item for mine, _, _ in found for item in mine) == list(range(7))
    assert [rest for _, *rest in found] == [[[3, 2, 2], 10]] * 3
    assert (
        json.loads(json.dumps(ALL.dealt([1, 2])))
        == ALL.on_every(lambda: [1, 2])[0]
        == ALL.on_first(lambda: [1, 2])
    )


def first_error(guilty: list[int]) -> str:
    def work() -> None:
        if dist.get_rank() in guilty:
            raise CheckpointError(f"wrong on rank {dist.get_rank()}")

    try:
        ALL.on_every(work)
    except CheckpointError as error:
        return str(error)
    return ""


def test_the_lowest_rank_that_fails_is_heard(pool: Pool) -> None:
    """Catches another error on each rank."""
    assert pool.run(first_error, 3, [2, 1]) == ["wrong on rank 1"] * 3
    assert pickle.loads(pickle.dumps(CheckpointWriteError(28, "full"))).errno == 28
