"""Training under DeepSpeed's engine: its reductions and updates over our groups and our experts.

Every rank holds whole copies of its slices over tensor and expert ranks, with the tables of the torch engine;
`replicate` and `shard` both only number the ranks that read different rows. DeepSpeed sums dense gradients
over `data` and experts' over `expert_data`, and from ZeRO 1 on spreads the optimizer's state over them.

Scaling. A rank's loss is its term of the global batch's loss, so a gradient is the plain sum of what all
ranks and micro-batches have, for experts as for the rest. DeepSpeed's own rule, a mean over `data` of losses
that are means, would need a loss that is `data` times larger; asked for sums it divides by nothing.
"""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from openmoe.parallel.collectives import Group, sum_flat
from openmoe.parallel.deepspeed_zero import State, ZeroState
from openmoe.parallel.meshes import Meshes
from openmoe.parallel.placement import ParameterLayout, whole_on_data_ranks
from openmoe.parallel.ranks import ShardedRanks
from openmoe.parallel.topology import GroupName, Topology, TopologyError


class DeepSpeedRanks(ShardedRanks):
    """A run whose gradients and updates are an engine's, once `attach` has been called.

    `layouts` are those of the torch engine, with its shards; only ZeRO's state in checkpoints has them.
    """

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        groups: dict[GroupName, Group],
        layouts: dict[str, ParameterLayout],
        meshes: Meshes,
        zero_stage: int,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(topology, groups, whole_on_data_ranks(layouts), meshes)
        self.model = model
        self.zero_stage = zero_stage
        self.engine: Any = None
        self._fsdp_layouts = layouts
        self._beat = beat
        self._zero: ZeroState | None = None
        self._is_first_step = True

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.model.named_parameters())

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        if self.zero_stage:
            self._zero = ZeroState(
                optimizer,
                self._fsdp_layouts,
                self.topology,
                self.groups,
                self.meshes,
                _expert_group(self.topology),
            )
        self.engine = start_engine(self, optimizer)
        if self._zero is not None:
            self._zero.begin(self.engine.optimizer)

    def gather_state(self) -> State | None:
        return None if self._zero is None else self._zero.gather()

    def put_back_state(self, state: State) -> None:
        if self._zero is not None:
            self._zero.put_back(state)

    def begin_micro_batch(self, last: bool) -> None:
        self._beat()
        if self._zero is not None and self._is_first_step:
            self._zero.read_parameters()  # a checkpoint may have been loaded into them
        self._is_first_step = False
        self.engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor) -> None:
        if self._zero is not None:  # what it sends on the way is not seen one by one
            self.groups["data"].observe("data", "all_reduce", 0)
        # Through the engine's forward pass, which prepares the backward pass; its module returns the loss.
        self.engine.backward(self.engine(loss), scale_wrt_gas=False)

    def finish_gradients(self) -> Tensor:
        if self._zero is not None:
            return self._zero.finish_gradients()
        # Not engine.allreduce_gradients(): it refuses float64, gives a frozen router a gradient of zeros, and
        # so an update, and does not say which group is next.
        present = [(self.layouts[name], p.grad) for name, p in self.named_parameters() if p.grad is not None]
        self._reduce("data", [grad for layout, grad in present if not layout.is_expert])
        self._reduce("expert_data", [grad for layout, grad in present if layout.is_expert])
        sum_flat(self.groups["tensor"], [grad for layout, grad in present if layout.partial_over_tensor])
        return self.global_norm(present)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        if self._zero is not None:
            self.groups["data"].observe("data", "all_gather", 0)
        self.engine.step()

    def parameter_norm(self) -> Tensor:
        return self.global_norm([(self.layouts[name], p.detach()) for name, p in self.named_parameters()])

    def _reduce(self, group: GroupName, grads: Sequence[Tensor]) -> None:
        if grads and self.groups[group].size > 1:
            self.groups[group].observe(group, "all_reduce", sum(grad.nbytes for grad in grads))
            self.engine.allreduce_no_retain(grads, self.groups[group].group)


def start_engine(ranks: DeepSpeedRanks, optimizer: torch.optim.Optimizer) -> Any:
    """The DeepSpeed engine of this process. All processes call it together."""
    parameter = next(ranks.model.parameters())
    deepspeed = import_deepspeed(parameter.device)
    for name, local in ranks.named_parameters():
        if ranks.layouts[name].is_expert:
            local.allreduce = False  # type: ignore[attr-defined]
            local.group_name = _expert_group(ranks.topology)  # type: ignore[attr-defined]
    engine, *_ = deepspeed.initialize(
        model=_root_module(ranks),
        optimizer=optimizer,
        config=_config(ranks.zero_stage),
        mpu=_ModelParallelUnit(ranks.groups),
        dist_init_required=False,  # there are groups already
    )
    if getattr(engine, "gradient_average", True):
        raise TopologyError(
            f"parallel.engine=deepspeed: deepspeed {deepspeed.__version__} can't sum gradients: allowed from "
            f"0.19.8"
        )
    # Its configuration knows no float64 here, and would have gradients travel as float32.
    engine.communication_data_type = parameter.dtype
    # Without ZeRO `finish_gradients` sees to it.
    engine.enable_backward_allreduce = ranks.zero_stage > 0
    return engine


def import_deepspeed(device: torch.device) -> Any:
    """The package, made to speak like the rest of a run."""
    os.environ["DS_ACCELERATOR"] = device.type  # read at import; otherwise whatever this machine has
    import deepspeed
    import deepspeed.moe.layer

    # Compiled at the first start, which takes minutes, and a start that is cut short leaves a lock for which
    # all later ones wait without a word. It is one way of sums between processes of a machine without GPUs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()  # it writes to the standard output
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    # It calls torch by older names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def _config(zero_stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": zero_stage, "reduce_scatter": True, "contiguous_gradients": True}
    if zero_stage:
        # With its own norm it would leave out a step whose gradients are not finite, without a word.
        zero["compute_grad_norm"] = False
    return {
        # Our batches are our own business; one micro-batch, so that nothing is divided by their number.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_allreduce_op": "sum",
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device in every step
    }


def _expert_group(topology: Topology) -> str:
    """DeepSpeed's name of both groups of an expert, of this form."""
    return f"ep_size_{topology.expert}"


def _root_module(ranks: DeepSpeedRanks) -> nn.Module:
    """What the engine takes for the model: its forward pass is the identity, as ours is done when there is a
    loss. It has no parameters but the model's."""
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups as registry

    class ExpertMarker(MoE):
        """Tells the engine that there are experts, and which groups they have. Is never called."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = ranks.topology.expert

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            name = _expert_group(ranks.topology)
            expert, expert_data = ranks.groups["expert"], ranks.groups["expert_data"]
            registry._EXPERT_PARALLEL_GROUP[name] = expert.group
            registry._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(expert.group)
            registry._EXPERT_DATA_PARALLEL_GROUP[name] = expert_data.group
            registry._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(expert_data.group)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ranks.model
            if any(layout.is_expert for layout in ranks.layouts.values()):
                self.marker = ExpertMarker()

        def forward(self, loss: Tensor) -> Tensor:
            return loss

    return Root()


class _ModelParallelUnit:
    """Megatron's interface, by which DeepSpeed asks for the groups of dense parameters."""

    def __init__(self, groups: dict[GroupName, Group]) -> None:
        self._data, self._tensor = groups["data"], groups["tensor"]

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data.group

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_data_parallel_rank(self) -> int:
        return self._data.rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor.group

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1
