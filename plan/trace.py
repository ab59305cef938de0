"""One micro-batch of a rank, run without memory: what it keeps, computes and touches.

The real model runs its forward and backward pass on the meta device, where tensors have shapes and nothing
else, while every operation is watched. So what is found follows the code; only what a device decides by
itself is put in its place: flash attention, evenly routed tokens, and collectives that keep shapes alone.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar, cast
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from openmoe.model import experts
from openmoe.model.parts import HEAD, modules_by_part

META = torch.device("meta")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Operations:
    """Some operations of one size. Arithmetic or memory may limit them, so both stand together."""

    times: int
    flops: int  # of each; matrix products and attention have any
    touched_bytes: int  # of each, read and written


@dataclass(frozen=True)
class Trace:
    """What one micro-batch costs a rank, forward and backward; its weights and their gradients not counted as
    kept."""

    peak_bytes: int
    peak_by_part: dict[str, int]  # who made what is alive at the peak
    by_part: dict[str, list[Operations]]

    @property
    def flops(self) -> int:
        return sum(each.times * each.flops for part in self.by_part.values() for each in part)


class Watch(TorchDispatchMode):
    """Notes what each operation costs and which memory is alive after it."""

    def __init__(self) -> None:
        super().__init__()
        self.by_part: dict[str, Counter[tuple[int, int]]] = {}
        self.events: list[tuple[int, int]] = []  # (number of a storage, bytes more or less)
        self._maker: dict[int, str] = {}  # number of a storage -> part
        self._number: dict[int, int] = {}  # of live storages, by address of their object
        self._references: dict[int, Any] = {}
        self._left_out: set[int] = set()
        self._at_work = [HEAD]  # parts, from outside to inside
        self._part_of_node: dict[int, str] = {}  # of the backward graph, by sequence number

    def follow(self, module: nn.Module, part: str) -> None:
        """What the module does belongs to `part`."""
        module.register_forward_pre_hook(lambda *_: self._at_work.append(part))
        # Also where recomputation leaves it by an exception.
        module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _leave(self) -> None:
        self._at_work.pop()

    def leave_out(self, tensor: Tensor) -> None:
        """Memory that another account holds: weights, and gradients of weights."""
        self._left_out.add(self._note(tensor))

    def counted(self) -> list[tuple[int, int]]:
        """The events but for memory left out."""
        return [event for event in self.events if event[0] not in self._left_out]

    def by_maker(self, events: list[tuple[int, int]]) -> dict[str, int]:
        """Bytes alive after these events, by the part that made them."""
        live: Counter[str] = Counter()
        for number, change in events:
            live[self._maker[number]] += change
        return {part: size_bytes for part, size_bytes in live.items() if size_bytes}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = operation(*args, **(kwargs or {}))
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.device == META]
        for tensor in written:
            self._note(tensor)
        if not operation.is_view and written:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            flops = _flops(operation._overloadpacket, args, kwargs or {}, out)
            touched = sum(_held_bytes(tensor) for tensor in (*read, *written))
            self.by_part.setdefault(self._part(), Counter())[flops, touched] += 1
        return out

    def _part(self) -> str:
        """A node of the backward graph belongs to the part that made it."""
        node = torch._C._current_autograd_node()
        if node is None:
            self._part_of_node[torch._C._autograd._get_sequence_nr() - 1] = self._at_work[-1]
        elif len(self._at_work) == 1:  # else its forward pass runs again
            return self._part_of_node.get(node._sequence_nr(), HEAD)
        return self._at_work[-1]

    def _note(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = id(storage)
        if address not in self._number:
            number = self._number[address] = len(self.events)
            size_bytes = storage.nbytes()
            self._maker[number] = self._part()
            self.events.append((number, size_bytes))

            def gone(_: Any) -> None:
                self.events.append((number, -size_bytes))
                del self._number[address], self._references[address]

            self._references[address] = weakref.ref(storage, gone)
        return self._number[address]


def _flops(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    masked = kwargs.get("attn_mask") is not None
    if operation is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return _products(args[0], 2, masked)  # scores, weighted values
    if operation is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        # Scores again, and the gradients of all three and of the scores.
        return _products(args[1], 5, masked)
    if operation is torch.ops.aten._grouped_mm:
        return 2 * args[0].numel() * args[1].shape[-1]
    formula = flop_registry.get(operation)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0


def _products(q: Tensor, products: int, masked: bool) -> int:
    """Of `[rows, heads, seq_len, head_dim]` with the half of the columns that is visible, under a mask with
    all of them."""
    return products * q.numel() * q.shape[2] * (2 if masked else 1)


def _held_bytes(tensor: Tensor) -> int:
    """An expanded tensor is as large as what it expands."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """As kernels do it, which keep no scores but their mask; the meta device would spell them out."""
    bias = None if attn_mask is None else attn_mask.to(q.dtype)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)[0]


def trace(model: nn.Module, loss: Callable[[], Tensor]) -> Trace:
    """Runs `loss`, which calls the model, and its backward pass. All tensors are on the meta device."""
    with (
        patch.object(F, "scaled_dot_product_attention", flash_attention),
        patch.object(experts, "_has_grouped_gemm", lambda x, weight: x.dtype == torch.bfloat16),
        Watch() as watch,
    ):
        for module, part in modules_by_part(model):
            watch.follow(module, part)
        for parameter in model.parameters():
            watch.leave_out(parameter)
            parameter.register_post_accumulate_grad_hook(lambda p: _release(watch, p))
        total = loss()
        total.backward()
    events = watch.counted()
    live_bytes = list(accumulate(change for _, change in events))
    peak_bytes = max(live_bytes)
    at_peak = watch.by_maker(events[: live_bytes.index(peak_bytes) + 1])
    by_part = {part: _operations(counted) for part, counted in watch.by_part.items()}
    return Trace(peak_bytes, at_peak, by_part)


def trace_operations(work: Callable[[], Result]) -> tuple[Result, list[Operations]]:
    """The result of `work` on the meta device, and what it computes."""
    with Watch() as watch:
        result = work()
    return result, [each for counted in watch.by_part.values() for each in _operations(counted)]


def _operations(counted: Counter[tuple[int, int]]) -> list[Operations]:
    return [Operations(times, flops, touched) for (flops, touched), times in counted.items()]


def _release(watch: Watch, parameter: Tensor) -> None:
    watch.leave_out(cast(Tensor, parameter.grad))
    parameter.grad = None
