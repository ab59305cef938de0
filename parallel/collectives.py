"""Collectives with a name: everything that ranks send each other, our own and FSDP's, passes here.

Before each one an observer is told the group, the kind and the size: the watchdog reports a hang by it, the
accounting counts by it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openmoe.parallel.topology import GroupName

# torch 2.13 has new names for two of them.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

# Called with (group, kind, bytes) before each collective: bytes of the larger side, or what is sent to all.
Observer = Callable[[GroupName, str, int], None]


class Group:
    """A process group of this rank; tensors are contiguous and of equal shape on all its ranks."""

    def __init__(self, name: GroupName, group: dist.ProcessGroup, observe: Observer) -> None:
        self.name = name
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.observe = observe

    def all_gather(self, x: Tensor) -> Tensor:
        """`[...]` -> `[size, ...]`, by rank."""
        x = x.contiguous()
        out = x.new_empty(self.size, *x.shape)
        self.observe(self.name, "all_gather", out.nbytes)
        _all_gather(out.view(-1), x.view(-1), self.group)
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """`[size, ...]` -> `[...]`: the sum over the ranks of what they have for this one."""
        x = x.contiguous()
        out = torch.empty_like(x[0])
        self.observe(self.name, "reduce_scatter", x.nbytes)
        _reduce_scatter(out.view(-1), x.view(-1), dist.ReduceOp.SUM, self.group)
        return out

    def all_to_all(
        self, x: Tensor, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
    ) -> Tensor:
        """Rows of x go to the ranks in order, `send[i]` of them to rank i; None = equal shares."""
        out, _ = self._all_to_all(x, send, receive, wait=True)
        return out

    def start_all_to_all(
        self, x: Tensor, send: Sequence[int] | None, receive: Sequence[int] | None
    ) -> tuple[Tensor, dist.Work]:
        """The same without waiting: what arrives may be read once `wait` is through."""
        out, work = self._all_to_all(x, send, receive, wait=False)
        assert work is not None
        return out, work

    def wait(self, kind: str, work: dist.Work) -> None:
        """Announced by itself, for others have begun since; nothing more is sent."""
        self.observe(self.name, f"wait for {kind}", 0)
        work.wait()

    def _all_to_all(
        self, x: Tensor, send: Sequence[int] | None, receive: Sequence[int] | None, wait: bool
    ) -> tuple[Tensor, dist.Work | None]:
        x = x.contiguous()  # first: empty_like keeps the strides
        out = torch.empty_like(x) if receive is None else x.new_empty(sum(receive), *x.shape[1:])
        self.observe(self.name, "all_to_all", x.nbytes)
        return out, dist.all_to_all_single(out, x, receive, send, self.group, async_op=not wait)

    def sum_(self, x: Tensor) -> None:
        self.observe(self.name, "all_reduce", x.nbytes)
        dist.all_reduce(x, dist.ReduceOp.SUM, self.group)


def sum_flat(group: Group, tensors: Sequence[Tensor]) -> None:
    """Sums each tensor over the group in place, all in one collective; they are of one dtype."""
    if not tensors or group.size == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    group.sum_(flat)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


class TensorGroup:
    """`model.tensor_ranks.TensorRanks` over a process group: sequence slices in rank order."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank = group.rank
        self.size = group.size

    def gather_sequence(self, x: Tensor) -> Tensor:
        return _GatherSequence.apply(x, self.group)

    def scatter_sequence(self, x: Tensor) -> Tensor:
        return _ScatterSequence.apply(x, self.group)

    def own_slice(self, x: Tensor) -> Tensor:
        return x.chunk(self.size, 1)[self.rank]

    def stack(self, x: Tensor) -> Tensor:
        return self.group.all_gather(x.detach())


def _gather(x: Tensor, group: Group) -> Tensor:
    """`[rows, seq / size, ...]` -> `[rows, seq, ...]`."""
    return group.all_gather(x).transpose(0, 1).flatten(1, 2)


def _scatter(x: Tensor, group: Group) -> Tensor:
    """`[rows, seq, ...]` -> `[rows, seq / size, ...]` of the sum."""
    return group.reduce_scatter(x.unflatten(1, (group.size, -1)).transpose(0, 1).contiguous())


class _GatherSequence(torch.autograd.Function):
    """Each rank went on with the whole sequence, so a slice's gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scatter(grad, ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    """Each rank's partial sums went into every slice, so their gradient is the whole sequence's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.group), None


def all_to_all(
    x: Tensor, group: Group, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
) -> Tensor:
    """`Group.all_to_all`, differentiable."""
    return _AllToAll.apply(x, group, send, receive)


class _AllToAll(torch.autograd.Function):
    """Gradients travel back the way the rows came."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: Group, send: Sequence[int] | None, receive: Sequence[int] | None
    ) -> Tensor:
        ctx.way = (group, send, receive)
        return group.all_to_all(x, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        group, send, receive = ctx.way
        return group.all_to_all(grad, receive, send), None, None, None


class OverlappedAllToAll:
    """`all_to_all` in two halves, to be used once: other work may lie between them, forward and backward.

    Backward, `finish` starts the way back and `start` waits for it. Of what is ready autograd runs the
    youngest first, so what lay between the halves lies there again.
    """

    def __init__(
        self, group: Group, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
    ) -> None:
        self.group = group
        self.send = send
        self.receive = receive
        self._under_way: tuple[Tensor, dist.Work] | None = None

    def start(self, x: Tensor) -> Tensor:
        """What will arrive; not to be read, only to be handed to `finish`."""
        return _Start.apply(x, self)

    def finish(self, arriving: Tensor) -> Tensor:
        return _Finish.apply(arriving, self)

    def begin(self, x: Tensor, back: bool) -> Tensor:
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        self._under_way = self.group.start_all_to_all(x, send, receive)
        return self._under_way[0]

    def wait(self) -> Tensor:
        assert self._under_way is not None
        (arrived, work), self._under_way = self._under_way, None
        self.group.wait("all_to_all", work)
        return arrived


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: OverlappedAllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.begin(x, back=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(), None  # what `_Finish` has sent; `grad` is of its rows still


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: Tensor, exchange: OverlappedAllToAll) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return arriving

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.begin(grad, back=True)
        return grad, None


class FsdpCollective:
    """What FSDP calls in place of its own all-gather and reduce-scatter, so that these are observed too."""

    def __init__(self, name: GroupName, observe: Observer) -> None:
        self.name = name
        self.observe = observe

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class ObservedAllGather(FsdpCollective):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self.observe(self.name, "all_gather", output_tensor.nbytes)
        return _all_gather(output_tensor, input_tensor, group, async_op)


class ObservedReduceScatter(FsdpCollective):
    """`then` is the group over which FSDP goes on to sum the result, by itself: announced with 0 bytes, as
    whether it does so is not known here. Over one rank FSDP makes the buffer and leaves out the call."""

    def __init__(self, name: GroupName, observe: Observer, then: GroupName | None) -> None:
        super().__init__(name, observe)
        self.then = then

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self._announce()
        return super().allocate(size, dtype=dtype, device=device)

    def _announce(self) -> None:
        if self.then is not None:
            self.observe(self.then, "all_reduce", 0)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        self.observe(self.name, "reduce_scatter", input_tensor.nbytes)
        work = _reduce_scatter(output_tensor, input_tensor, op, group, async_op)
        self._announce()
        return work
