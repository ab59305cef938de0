"""A model over the devices of an XLA mesh: the ordinary Decoder with global shapes, laid out by `axis_rules`.

    build on the meta device -> constrain activations -> recompute -> put initial values in their places

Nothing is cut by hand: the compiler partitions the program, and losses, norms and sums are global as they
stand.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder
from openmoe.model.dispatch import einsum_dispatcher
from openmoe.model.init import fill
from openmoe.model.layers import einsum_attention
from openmoe.model.losses_by_position import positions_head_loss
from openmoe.optim.build import state_dims
from openmoe.parallel.axis_rules import parameter_spec, spec_of
from openmoe.parallel.collectives import Group, Observer
from openmoe.parallel.config import ParallelConfig
from openmoe.parallel.ranks import RowDevices, SentNumbers
from openmoe.parallel.spread_tensors import SpreadTensor
from openmoe.parallel.topology import Topology, TopologyError
from openmoe.parallel.watchdog import NO_WATCHDOG, NoWatchdog
from openmoe.parallel.xla import LocalParts, Spmd

# Float32 logits of a tile of the head on one device.
HEAD_TILE_BYTES = 256 * 2**20
ROWS = ("rows", "positions", "embed")


def check_xla(config: ModelConfig, parallel: ParallelConfig, topology: Topology, packing: str) -> None:
    """Raises TopologyError for what has shapes that follow from the data, or has no meaning under XLA."""
    topology.xla_shape()
    for key, value, allowed in (
        ("model.dispatch", config.dispatch, "einsum"),
        ("model.dropless", config.dropless, False),
        ("data.packing", packing, "released"),
        ("parallel.compile", parallel.compile, False),
    ):
        if value != allowed:
            raise TopologyError(f"{key}={_text(value)}: allowed {_text(allowed)} with parallel.engine=xla")
    if parallel.recompute == "selective":
        raise TopologyError("parallel.recompute=selective: allowed none or full with parallel.engine=xla")
    if parallel.exchange == "uneven":
        raise TopologyError("parallel.exchange=uneven: allowed auto or fixed with parallel.engine=xla")
    if parallel.overlap == "on":
        raise TopologyError(
            "parallel.overlap=on: allowed auto or off with parallel.engine=xla, whose compiler decides"
        )


def _text(value: str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else value


def build_spmd(
    config: ModelConfig,
    parallel: ParallelConfig,
    topology: Topology,
    dtypes: tuple[torch.dtype, torch.dtype],
    seed: int,
    observe: Observer = lambda group, kind, size_bytes: None,
    watchdog: NoWatchdog = NO_WATCHDOG,
) -> tuple[Decoder, "XlaRanks"]:
    """The model with its initial values over all devices, and what training needs of them.

    `dtypes` of parameters and of activations; `observe` is told of what hosts exchange.
    """
    parameter_dtype, compute_dtype = dtypes
    spmd = Spmd(topology)
    model = meta_model(config, parallel, spmd, compute_dtype)
    for name, parameter in list(model.named_parameters()):
        whole = torch.empty(parameter.shape, dtype=parameter_dtype)
        slices = tuple(slice(0, size) for size in whole.shape)
        fill(whole, config, seed, name, tuple(whole.shape), slices)
        put_parameter(model, name, spmd.put(whole, parameter_spec(name, whole.dim())))
    world = dist.group.WORLD if dist.is_initialized() else None
    hosts = Group("world", world, observe) if world else None
    return model, XlaRanks(model, spmd, hosts, watchdog)


def meta_model(
    config: ModelConfig, parallel: ParallelConfig, spmd: Spmd, compute_dtype: torch.dtype
) -> Decoder:
    """The model with constraints on its activations, its parameters on the meta device."""
    with torch.device("meta"):
        model = Decoder(
            config,
            dispatcher=einsum_dispatcher(spmd.constrain),
            compute_dtype=compute_dtype,
            head_loss=positions_head_loss(
                HEAD_TILE_BYTES * spmd.devices, spmd.constrain, spmd.data_ranks, spmd.in_order
            ),
            attend=einsum_attention,
        )
    for block in model.layers:
        if parallel.recompute == "full":
            _recompute(block, spmd)
        block.register_forward_pre_hook(
            lambda _, arguments: (spmd.constrain(arguments[0], ROWS), *arguments[1:])
        )
    return model


def put_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, nn.Parameter(value))


def _recompute(block: nn.Module, spmd: Spmd) -> None:
    """`spmd.recompute` knows tensors only, side by side."""
    forward = block.forward
    structure: list[Any] = []

    def flat(*arguments: Any) -> tuple[Any, ...]:
        leaves, spec = tree_flatten(forward(*arguments))
        structure[:] = [spec]
        return tuple(leaves)

    recomputed = spmd.recompute(flat)
    block.forward = lambda *arguments: tree_unflatten(recomputed(*arguments), structure[0])


class XlaRanks:
    """The hosts of a run over an XLA mesh, seen from one of them."""

    data_rank, data_size = 0, 1  # each host has all rows, of which its devices take theirs
    counts_loss = True
    loss_terms = 1
    shards = None  # a tensor is whole

    def __init__(
        self,
        model: nn.Module,
        spmd: Spmd,
        hosts: Group | None = None,
        watchdog: NoWatchdog = NO_WATCHDOG,
    ) -> None:
        """`hosts` exchange numbers of their own where there are several."""
        self.rank = hosts.rank if hosts else 0
        self.world_size = hosts.size if hosts else 1
        self.rows = RowDevices(spmd.kind, spmd.here, spmd.data_ranks, self._put_rows)
        self._model, self._spmd, self._hosts, self._watchdog = model, spmd, hosts, watchdog
        self._micro_batches = 0  # since the last update
        self._compiled: set[str] = set()

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._model.named_parameters())

    def as_whole(self, name: str, local: Tensor, dims: Sequence[int]) -> Tensor:
        if local.device.type != "xla":
            return local
        return SpreadTensor(local.shape, local.dtype, LocalParts(local), name)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """The state of the optimizer lies as its parameters do."""
        dims_of = state_dims(optimizer)
        for group in optimizer.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                spec = parameter_spec(name, param.dim())
                for key, value in optimizer.state[param].items():
                    if value.device.type == "xla":
                        self._spmd.mark(value, tuple(spec[dim] for dim in dims_of[name][key]))
        self._spmd.sync()

    def gather_state(self) -> None:
        return None

    def put_back_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        pass

    def begin_micro_batch(self, last: bool) -> None:
        # What came before is a program of its own: the first of a step, or one like those between.
        kind = "training" if self._model.training else "validation"
        self._run(f"{kind} {min(self._micro_batches, 2)}")
        self._micro_batches += 1

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for name, param in self.named_parameters():
            if param.grad is not None:  # else a partitioner is free to keep it whole between two programs
                self._spmd.mark(param.grad, parameter_spec(name, param.dim()))

    def finish_gradients(self) -> Tensor:
        return _norm([p.grad for p in self._model.parameters() if p.grad is not None])

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        self._model.zero_grad(set_to_none=True)
        self._run("update")
        self._micro_batches = 0

    def parameter_norm(self) -> Tensor:
        return _norm([p.detach() for p in self._model.parameters()])

    def sum_(self, x: Tensor) -> None:
        pass

    def send_numbers(self, terms: Tensor, same: Tensor, own: Sequence[float]) -> SentNumbers:
        numbers = torch.cat([terms, same])
        self._run("numbers")
        return SentNumbers(numbers, own)

    def read_numbers(self, sent: Sequence[SentNumbers]) -> list[tuple[Tensor, Tensor]]:
        """A transfer for each: to stack them would be another program for each number of them."""
        of_hosts = torch.tensor([[numbers.own for numbers in sent]], dtype=torch.float64)
        if self._hosts is not None:
            everyone = of_hosts.new_zeros(self.world_size, *of_hosts.shape[1:])
            everyone[self.rank] = of_hosts[0]
            self._hosts.sum_(everyone)
            of_hosts = everyone
        rows = [numbers.on_device.cpu() for numbers in sent]
        return list(zip(rows, of_hosts.unbind(1), strict=True))

    def _run(self, program: str) -> None:
        """What was recorded. A program that may have to be compiled is not watched, as that takes minutes; it
        is there once a run of it has compiled nothing."""
        self._watchdog.beat()
        if program in self._compiled:
            self._spmd.sync()
            return
        before = self._spmd.programs()
        with self._watchdog.pause():
            self._spmd.sync()
        if self._spmd.programs() == before:
            self._compiled.add(program)

    def _put_rows(self, rows: Tensor) -> Tensor:
        spec = spec_of(("rows", *("positions",) * (rows.dim() - 1)))
        return self._spmd.put(rows, spec)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Squares are summed in the tensors' type, the last dimension first, and only the sums of tensors in
    float64, which a TPU emulates: a compiler takes minutes for it. No change of shape, which would move what
    lies on many devices."""
    sums = [torch.linalg.vector_norm(x, dim=-1).square().sum() for x in tensors]
    return torch.stack(sums).double().sum().sqrt()
