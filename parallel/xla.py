"""torch_xla, and nothing else imports it: all devices of a run as one mesh that a compiler partitions (SPMD).

One process a host traces a program over global tensors; GSPMD cuts it along the mesh and puts the collectives
in. What lies where is said by logical axes (`axis_rules`). Operations only record a program, which `sync`
compiles, once for each shape it has, and runs.
"""

import importlib.util
import logging
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
from torch import Tensor

from openmoe.parallel.axis_rules import MESH_AXES, Spec, spec_of
from openmoe.parallel.spread_tensors import Box
from openmoe.parallel.topology import Topology, TopologyError


def start(hosts: int = 1) -> int:
    """Takes this host's devices for one of `hosts` processes; the number of devices of all of them.

    To be called before any backward pass: torch_xla dies in the first of its own where the CPU has had one
    before it.

    Raises TopologyError where torch_xla is not installed, finds no device, or devices of other hosts than
    those of the run.
    """
    if importlib.util.find_spec("torch_xla") is None:
        raise TopologyError(
            "parallel.engine=xla: torch_xla is not installed in this environment (extra: tpu; `make "
            "test-xla` builds one); allowed without it: torch, deepspeed"
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # else each compilation warns that GSPMD has an heir
    import torch_xla
    import torch_xla.backends
    import torch_xla.runtime as xr

    logging.getLogger(torch_xla.backends.__name__).setLevel(logging.ERROR)  # it warns of any precision
    try:
        xr.use_spmd()
        torch_xla.device()
        # A TPU multiplies float32 matrices as bfloat16 unless told otherwise. Activations that are to be
        # bfloat16 are so by themselves; what is still float32 (the router) is meant to be.
        torch_xla.backends.set_mat_mul_precision("highest")
        devices, here = int(xr.global_runtime_device_count()), int(xr.addressable_runtime_device_count())
    except RuntimeError as error:
        raise TopologyError(f"parallel.engine=xla: no device: {str(error).splitlines()[0]}") from None
    if devices // here != hosts:
        raise TopologyError(
            f"WORLD_SIZE={hosts}: allowed {devices // here} with parallel.engine=xla: its {devices} devices, "
            f"{here} of them here, are those of so many hosts, and each host has one process"
        )
    return devices


class Spmd:
    """The mesh of a run: where tensors lie on it, and when its program runs."""

    def __init__(self, topology: Topology) -> None:
        """Raises TopologyError where the devices are not those of the topology."""
        import torch_xla
        import torch_xla.distributed.spmd as xs
        import torch_xla.runtime as xr
        from torch_xla._internal import tpu

        devices = int(xr.global_runtime_device_count())
        if devices != topology.world_size:
            raise TopologyError(
                f"a layout of {topology.world_size} devices over {devices} of them: allowed the same number"
            )
        self.devices, self.here = devices, int(xr.addressable_runtime_device_count())
        self.data_ranks = devices // topology.tensor
        self.device = torch_xla.device()
        self.kind = f"TPU v{tpu.version()}" if xr.device_type() == "TPU" else str(xr.device_type())
        self.mesh = xs.Mesh(np.arange(devices), topology.xla_shape(), MESH_AXES)

    def put(self, tensor: Tensor, spec: Spec) -> Tensor:
        """A host tensor, the same on all hosts, over the devices: each gets its part of it."""
        import torch_xla.core.xla_model as xm
        import torch_xla.distributed.spmd as xs

        sharding = xs.ShardingSpec(self.mesh, spec)
        return cast(Tensor, xm.send_cpu_data_to_device(tensor, self.device, sharding)[0])

    def constrain(self, x: Tensor, axes: tuple[str, ...]) -> Tensor:
        """`model.dispatch.Constrain`: x and, in the backward pass, its gradient lie as the axes say."""
        import torch_xla.distributed.spmd as xs

        return xs.mark_sharding_with_gradients(x, self.mesh, spec_of(axes))

    def mark(self, tensor: Tensor, spec: Spec) -> None:
        """The tensor, which has no place of its own yet, is to lie so."""
        import torch_xla
        import torch_xla.distributed.spmd as xs

        if torch_xla._XLAC._get_xla_sharding_spec(tensor) == "":
            xs.mark_sharding(tensor, self.mesh, spec)

    def sync(self) -> None:
        """Runs what was recorded, without waiting for it."""
        import torch_xla

        torch_xla.sync()

    def in_order(self, first: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
        """`model.losses_by_position.InOrder`."""
        import torch_xla.core.xla_model as xm

        pair = first.clone(), then.clone()  # the barrier is put on tensors in place
        xm.optimization_barrier_(list(pair))
        return pair

    def programs(self) -> int:
        """Compiled so far by this process."""
        from torch_xla.debug import metrics

        found = metrics.metric_data("CompileTime")
        return int(found[0]) if found else 0

    def recompute(self, function: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
        """The function, which takes and gives tensors, run again in its backward pass. Torch's own way would
        be undone by the compiler, which sees that both runs are the same; here a barrier keeps them apart."""
        from torch_xla.utils.checkpoint import checkpoint

        return partial(checkpoint, function, preserve_rng_state=False)


class Traced(NamedTuple):
    """A program that was recorded and not run."""

    text: str  # HLO over global shapes
    sources: list[int]  # of each of its parameters, see `TracedSpmd.source`; -1 = a number of the host


class TracedSpmd(Spmd):
    """The same mesh for programs that are compiled elsewhere and never run: what is put on it takes no
    memory, and what is recorded stays so until somebody asks for it."""

    def put(self, tensor: Tensor, spec: Spec) -> Tensor:
        """A tensor without values of this shape and type; `tensor` may be on the meta device."""
        import torch_xla
        from torch_xla.core.xla_builder import create_placeholder_tensor

        placed = create_placeholder_tensor(tuple(tensor.shape), tensor.dtype)
        torch_xla._XLAC._xla_annotate_custom_sharding(placed, self.mesh.get_op_sharding(spec))
        return cast(Tensor, placed)

    def sync(self) -> None:
        pass

    def source(self, tensor: Tensor) -> int:
        """By what a program knows a tensor that was put and has not been changed yet."""
        import torch_xla

        (number,) = torch_xla._XLAC._get_tensors_xla_device_data_node([tensor])[0]
        return int(number)

    def program(self, results: Sequence[Tensor]) -> Traced:
        """All that leads to these tensors, in this order."""
        import torch_xla

        sources = torch_xla._XLAC._get_tensors_xla_device_data_node(list(results))[0]
        return Traced(torch_xla._XLAC._get_xla_tensors_hlo(list(results)), list(map(int, sources)))


class LocalParts:
    """`spread_tensors.DeviceParts` of a tensor over the devices, as it lies there when all is done that is
    under way; of the tensor nothing may be recorded that has not run. Moves the parts of this host alone."""

    def __init__(self, tensor: Tensor) -> None:
        import torch_xla.core.xla_model as xm

        xm.wait_device_ops()
        self._tensor = tensor

    def copies(self) -> int:
        return self._layout()[1]

    def places(self) -> list[tuple[int, Box]]:
        import torch_xla

        whole = tuple(slice(0, size) for size in self._tensor.shape)
        [of_devices] = torch_xla._XLAC._get_local_shard_replica_and_indices([self._tensor])
        return [
            (copy, whole if box is Ellipsis else tuple(slice(side.start, side.stop) for side in box))
            for copy, box in of_devices
        ]

    def read(self) -> list[Tensor]:
        import torch_xla

        places = self.places()
        if max(self._layout()[0], default=1) == 1:
            return [self._tensor.cpu()] * len(places)  # from one device, not from all
        [shards] = torch_xla._XLAC._get_local_shards([self._tensor])
        return [
            shard[tuple(slice(0, side.stop - side.start) for side in box)]  # without padding
            for (shard, _), (_, box) in zip(shards, places, strict=True)
        ]

    def write(self, parts: Sequence[Tensor]) -> None:
        import torch_xla

        tiles, _ = self._layout()
        if max(tiles, default=1) == 1:
            self._tensor.copy_(parts[0])
            return
        size = [-(-whole // count) for whole, count in zip(self._tensor.shape, tiles, strict=True)]
        devices = torch_xla._XLAC._xla_get_runtime_devices()
        torch_xla._XLAC._load_local_shards(self._tensor, [_padded(part, size) for part in parts], devices)

    def _layout(self) -> tuple[list[int], int]:
        """Into how many parts each dimension is cut, and how many copies there are of each part."""
        import torch_xla
        import torch_xla.runtime as xr

        sharding = torch_xla._XLAC._get_xla_sharding_spec(self._tensor)
        found = re.match(r"\{devices=\[([\d,]+)\]", sharding)
        if found is None:
            return [1] * self._tensor.dim(), int(xr.global_runtime_device_count())
        tiles = [int(count) for count in found[1].split(",")]
        copies = tiles.pop() if "last_tile_dim_replicate" in sharding else 1
        return tiles, copies


def _padded(part: Tensor, size: Sequence[int]) -> Tensor:
    if list(part.shape) == list(size):
        return part
    whole = part.new_zeros(size)
    whole[tuple(slice(0, length) for length in part.shape)] = part
    return whole
