"""A training over the mesh and the same in one process, step by step."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from torch import Tensor

from openmoe.data.loader import StepBatch
from openmoe.data.prepare import prepare
from openmoe.launcher.entry import to_page
from openmoe.launcher.schema import Config
from openmoe.launcher.train import build_loader, source_names
from openmoe.optim.build import build_optimizer
from openmoe.optim.schedules import learning_rate
from openmoe.parallel.build import build
from openmoe.parallel.topology import Topology, resolve
from openmoe.train.record import read_metrics, send_metrics
from openmoe.train.step import MicroBatch, micro_batches, train_step

CPU = torch.device("cpu")
STEPS, MARK = 10, 5
# UL2 up to the mark, then causal LM on another mix: the rows of a run across its switch.
SWITCH = (
    f"curriculum=[{{until_steps: {MARK}, mix: {{manual: 1, code: 1}}, objective: ul2}}, "
    f"{{until_steps: {STEPS}, mix: {{code: 3, docstrings: 1}}, objective: causal_lm}}]"
)


@cache
def page(experiment: str, *overrides: str) -> Config:
    arguments = [
        f"experiment={experiment}", "model.dispatch=einsum", "train.global_batch_rows=16", "train.seq_len=64",
        "data.tokenizer.vocab_size=512", "data.workers=0", SWITCH, *overrides,
    ]  # fmt: skip
    with initialize_config_module("openmoe.conf", version_base="1.3"):
        return to_page(compose("config", arguments), Config)


def mesh(data: int, expert: int, model: int) -> tuple[str, ...]:
    del data  # what is left
    return ("parallel.engine=xla", f"parallel.expert={expert}", f"parallel.tensor={model}")


@cache
def batches(experiment: str) -> list[StepBatch]:
    config = page(experiment)
    data = prepare(config.data, config.model.vocab_size, source_names(config))
    loader = build_loader(config, data)
    return [next(loader) for _ in range(STEPS)]


class Training:
    """One of the two."""

    def __init__(self, config: Config, devices: int = 1) -> None:
        self.config = config
        self.topology = resolve(config.parallel, devices) if devices > 1 else Topology(1, 1, 1, 1, 1)
        self.model, self.ranks = build(
            config.model, config.parallel, self.topology, config.train.precision, CPU, seed=0
        )
        self.optimizer = build_optimizer(config.optim, self.ranks.named_parameters(), self.ranks.shards)
        self.ranks.attach(self.optimizer)
        self.gradients: dict[str, Tensor] = {}

    def micro(self, batch: StepBatch) -> list[MicroBatch]:
        rows = self.config.train.micro_batch_rows
        return micro_batches(batch.arrays, rows, CPU, packed=False, spread=self.ranks.rows)

    def step(self, number: int, batch: StepBatch, rate: float | None = None) -> dict[str, Any]:
        """The step's metrics; `gradients` are then those of this step. `rate` None is the schedule's."""
        self.gradients = {}
        hook = self.optimizer.register_step_pre_hook(lambda *_: self._keep_gradients())
        rate = rate or learning_rate(self.config.optim.schedule, number)
        micro, train = self.micro(batch), self.config.train
        result = train_step(self.model, self.optimizer, micro, batch.loss_tokens, rate, train, self.ranks)
        hook.remove()
        layers = self.config.model.moe_layers
        return read_metrics([send_metrics(result, layers, self.ranks, {})], layers, self.ranks)[0][0]

    def _keep_gradients(self) -> None:
        # Clones would be more of the program; these are what zero_grad lets go of.
        self.gradients = {name: p.grad for name, p in self.ranks.named_parameters() if p.grad is not None}

    @torch.no_grad()
    def route(self, batch: StepBatch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each MoE layer: chosen experts and which of them were kept `[rows, seq_len, k]`, and the margin
        `[rows, seq_len]` between the probability of any choice and the next."""
        traces = [self.model(block.batch, trace=True).traces for block in self.micro(batch)]
        layers = [
            [
                torch.cat([getattr(part, name) for part in layer])
                for name in ("expert_index", "kept", "logits")
            ]
            for layer in zip(*traces, strict=True)
        ]
        for index, kept, logits in on_host(layers):
            best = logits.softmax(-1).sort(-1, descending=True).values[..., : index.shape[-1] + 1]
            yield index, kept, (best[..., :-1] - best[..., 1:]).amin(-1)


def on_host(tensors: list[list[Tensor]]) -> list[list[Tensor]]:
    """As one tensor: reading one that lies on many devices makes a program each time."""
    flat = torch.cat([x.double().flatten() for row in tensors for x in row]).cpu()
    parts = iter(flat.split([x.numel() for row in tensors for x in row]))
    return [[next(parts).view(x.shape) for x in row] for row in tensors]


def routed(batch: StepBatch, config: Config) -> np.ndarray:
    """Tokens that go to experts, `[rows, seq_len]`."""
    return (batch.arrays["target_tokens"] > 0) | config.model.route_padding
