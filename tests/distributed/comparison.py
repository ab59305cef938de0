"""Training under a layout, and how far it is from training in one process; called on each rank and without
any process group alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from torch import Tensor

from openmoe.launcher.entry import to_page
from openmoe.launcher.schema import Config
from openmoe.optim.build import build_optimizer
from openmoe.optim.schedules import learning_rate
from openmoe.parallel.build import build
from openmoe.parallel.collectives import Observer
from openmoe.parallel.deepspeed_engine import DeepSpeedRanks
from openmoe.parallel.ranks import Ranks, ShardedRanks
from openmoe.parallel.topology import Topology, check_fit
from openmoe.train.record import read_metrics, send_metrics
from openmoe.train.step import MicroBatch, micro_batches, train_step
from tests.distributed.device import device
from tests.distributed.layouts import Variant

ONE = Topology(1, 1, 1, 1, 1)
STEPS = 12
TOKENS_PER_STEP = 1024  # so that more rows are shorter ones, and every batch costs the same
MIN_ROWS = 16
MARGIN = 1e-6  # a choice whose probability is closer to the next one's may fall either way
# Of what sums in another order may do; see Comparison.
LIMITS = {"loss_error": 1e-10, "gradient_error": 5e-6, "grad_norm_error": 1e-6, "metric_error": 1e-6}
LOSSES = ("loss", "lm_loss", "z_loss", "load_balancing_loss", "router_z_loss")

Slices = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Setup:
    """A training that is to be the same under any layout."""

    config: Config  # rows and length as they are here; micro-batches are the variant's
    variant: Variant

    @property
    def reference_key(self) -> str:
        """Setups with the same one differ in what must make no difference."""
        model = self.config.model
        capacity = "dropless" if model.dropless else "capacity"
        rows = self.config.train.global_batch_rows
        return f"{self.variant.model}_{model.n_layers}_layers_{capacity}_{rows}_rows"


@cache
def page(experiment: str) -> Config:
    with initialize_config_module("openmoe.conf", version_base="1.3"):
        return to_page(compose("config", [f"experiment={experiment}"]), Config)


def setup(topology: Topology, variant: Variant, n_layers: int | None = None) -> Setup:
    """A variant with as many rows as the layout needs; n_layers None is the model's own."""
    config = page(variant.model)
    model = config.model.model_copy(
        update={"dropless": variant.dropless, "n_layers": n_layers or config.model.n_layers}
    )
    rows = max(MIN_ROWS, topology.size("data") * variant.micro_batches * config.model.group_rows)
    changes: dict[str, Any] = {
        "model": model,
        "train": config.train.model_copy(
            update={"global_batch_rows": rows, "seq_len": TOKENS_PER_STEP // rows}
        ),
        "parallel": config.parallel.model_copy(
            update={"recompute": variant.recompute, "exchange": variant.exchange}
        ),
    }
    return Setup(config.model_copy(update=changes), variant)


def arrays(step: int, rows: int, seq_len: int, vocab_size: int) -> dict[str, np.ndarray]:
    """The batch of one step: frequent and rare tokens; the later a row the shorter its text, the last is all
    padding; several examples in the first half of the rows only; losses of three weights."""
    draw = np.random.default_rng(step)
    segments = np.zeros((rows, seq_len), np.int32)
    for row in range(rows - 1):
        length = seq_len - row * seq_len // (rows + 2)
        segments[row, :length] = 1
        if row < rows // 2:
            segments[row, draw.integers(1, length) : length] = 2
    real = segments > 0
    targets = np.where(real, np.minimum(draw.zipf(1.2, segments.shape), vocab_size - 1), 0)
    starts = np.diff(segments, axis=1, prepend=0) != 0
    inputs = np.where(real & ~starts, np.roll(targets, 1, axis=1), 0)
    weights = draw.choice([0.0, 0.5, 1.0], segments.shape, p=[0.2, 0.2, 0.6]) * real
    return {
        "input_tokens": inputs,
        "target_tokens": targets,
        "loss_weights": weights.astype(np.float32),
        "segment_ids": segments,
        "prefix_mask": np.zeros(segments.shape, bool),
        "source_ids": np.zeros(segments.shape, np.int16),
    }


class Training:
    """One rank of a training, or all of it where there is no process group."""

    def __init__(
        self, setup: Setup, topology: Topology, precision: str, observe: Observer = lambda *_: None
    ) -> None:
        config = setup.config
        train = config.train
        self.config, self.topology = config, topology
        self.device = device()
        self.model, self.ranks = build(
            config.model, config.parallel, topology, precision, self.device, seed=0, observe=observe
        )
        rows = topology.rows_of(self.ranks.rank, train.global_batch_rows)
        self.rows = rows
        self.micro_batch_rows = (rows.stop - rows.start) // setup.variant.micro_batches
        check_fit(topology, config.model, train.seq_len, train.global_batch_rows, self.micro_batch_rows)
        self.optimizer = build_optimizer(config.optim, self.ranks.named_parameters(), self.ranks.shards)
        self.ranks.attach(self.optimizer)

    def batch(self, step: int) -> tuple[list[MicroBatch], float]:
        """This rank's micro-batches, and the loss tokens of all ranks."""
        train = self.config.train
        whole = arrays(step, train.global_batch_rows, train.seq_len, self.config.model.vocab_size)
        own = {name: array[self.rows] for name, array in whole.items()}
        packed = bool(whole["segment_ids"].max() > 1)
        micro = micro_batches(own, self.micro_batch_rows, self.device, packed=packed)
        return micro, float(whole["loss_weights"].sum())

    def step(self, number: int, optimizer: Any = None) -> dict[str, Any]:
        micro, loss_tokens = self.batch(number)
        rate = learning_rate(self.config.optim.schedule, number)
        if optimizer is not None and isinstance(self.ranks, DeepSpeedRanks):
            self.ranks.engine.optimizer = optimizer  # which its engine steps
        result = train_step(
            self.model,
            optimizer or self.optimizer,
            micro,
            loss_tokens,
            rate,
            self.config.train,
            self.ranks,
        )
        layers = self.config.model.moe_layers
        return read_metrics([send_metrics(result, layers, self.ranks, {})], layers, self.ranks)[0][0]


class GradientReader:
    """In an optimizer's place: keeps the complete gradients of the first step and changes nothing."""

    param_groups: Sequence[dict[str, Any]] = ()

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.gradients: dict[str, Tensor] = {}

    def step(self) -> None:
        self.gradients = {
            name: parameter.grad.clone()
            for name, parameter in self.ranks.named_parameters()
            if parameter.grad is not None
        }


@dataclass(frozen=True)
class LayerRouting:
    expert_index: Tensor  # [rows, positions, k]
    kept: Tensor  # [rows, positions, k] bool
    margin: Tensor  # [rows, positions], between the probabilities of any choice and the next
    routed: Tensor  # [rows, positions] bool; False = padding that goes to no expert


@torch.no_grad()
def route(training: Training) -> tuple[list[LayerRouting], slice]:
    """Routing of the first batch by the initial weights, per MoE layer, and the columns of this rank."""
    blocks = [block.batch for block in training.batch(0)[0]]
    traces = [training.model(block, trace=True).traces for block in blocks]
    if not traces[0]:
        return [], slice(None)  # no experts
    first, last = traces[0][0].positions[0][[0, -1]].tolist()
    columns = slice(first, last + 1)
    real = torch.cat([block.target_tokens > 0 for block in blocks])[:, columns]
    layers = []
    for parts in zip(*traces, strict=True):
        k = parts[0].expert_index.shape[-1]
        probabilities = torch.cat([part.logits for part in parts]).softmax(-1)
        best = probabilities.sort(-1, descending=True).values[..., : k + 1]
        layers.append(
            LayerRouting(
                torch.cat([part.expert_index for part in parts]),
                torch.cat([part.kept for part in parts]),
                (best[..., :-1] - best[..., 1:]).amin(-1),
                real | training.config.model.route_padding,
            )
        )
    return layers, columns


@dataclass(frozen=True)
class Reference:
    """What one process does."""

    metrics: list[dict[str, Any]]  # of each step in float64
    step_metrics: dict[str, Any]  # of one step in float32
    gradients: dict[str, Tensor]  # of it
    routing: list[LayerRouting]


def train_in_one_process(setup: Setup, file: Path) -> None:
    """Writes the Reference of a setup: the whole batch at once, without recomputation.

    A case of one rank, as the ranks are not disturbed by threads, but without a process group.
    """
    dist.destroy_process_group()
    plain = Setup(
        setup.config.model_copy(update={"parallel": page("tiny").parallel}),
        Variant(setup.variant.model, setup.variant.dropless),
    )
    training = Training(plain, ONE, "fp64")
    metrics = [training.step(number) for number in range(STEPS)]
    training = Training(plain, ONE, "fp32")
    reader = GradientReader(training.ranks)
    one_step = training.step(0, reader)
    torch.save(Reference(metrics, one_step, reader.gradients, route(training)[0]), file)


@dataclass(frozen=True)
class Findings:
    """What one rank has found; the same metrics on all of them."""

    metrics: list[dict[str, Any]]
    step_metrics: dict[str, Any]
    # Largest difference of a gradient from the reference, relative to the largest of the whole tensor.
    gradient_errors: dict[str, float]
    slices: dict[str, Slices]  # of each parameter's gradient
    choices: int  # of tokens in MoE layers that were compared, those with a margin
    near_ties: int  # left out of the comparison
    other_choices: int  # tokens that went to other experts than in the reference
    other_kept: int  # tokens that went to the same and got other slots


def train_under_layout(setup: Setup, topology: Topology, reference_file: Path) -> Findings:
    """The case of one rank."""
    reference: Reference = torch.load(reference_file, device(), weights_only=False)
    training = Training(setup, topology, "fp64")
    metrics = [training.step(number) for number in range(STEPS)]
    training = Training(setup, topology, "fp32")
    reader = GradientReader(training.ranks)
    one_step = training.step(0, reader)
    assert isinstance(training.ranks, ShardedRanks)
    assert reader.gradients.keys() == reference.gradients.keys()
    slices, errors = {}, {}
    for name, gradient in reader.gradients.items():
        part = training.ranks.layouts[name].slices(topology, dist.get_rank())
        whole = reference.gradients[name]
        slices[name] = tuple((dim.start, dim.stop) for dim in part)
        assert gradient.shape == whole[part].shape, name
        difference = (gradient - whole[part]).abs()
        errors[name] = difference.max().item() / whole.abs().max().item() if gradient.numel() else 0.0
    layers, columns = route(training)
    choices = near_ties = other_choices = other_kept = 0
    for ours, all_ranks in zip(layers, reference.routing, strict=True):
        at = training.rows, columns
        routed, clear = all_ranks.routed[at], all_ranks.margin[at] > MARGIN
        same = (ours.expert_index == all_ranks.expert_index[at]).all(-1)
        choices += int((routed & clear).sum())
        near_ties += int((routed & ~clear).sum())
        other_choices += int((routed & clear & ~same).sum())
        other_kept += int((routed & same & (ours.kept != all_ranks.kept[at]).any(-1)).sum())
    return Findings(metrics, one_step, errors, slices, choices, near_ties, other_choices, other_kept)


@dataclass(frozen=True)
class Comparison:
    """A layout against one process: the worst of all ranks."""

    loss_error: float  # in nats, of any loss of any of the steps, float64
    metric_error: float  # of everything else in a step's line but the norm: shares of tokens and choices
    grad_norm_error: float  # relative, of float64 and float32
    gradient_error: float  # relative to the largest of its tensor, float32
    worst_gradient: str
    choices: int
    near_ties: int
    other_choices: int
    other_kept: int
    wrong: list[str] = field(default_factory=list)  # what has no size: ranks that disagree, missing parts

    def within_limits(self) -> bool:
        return (
            all(getattr(self, name) < limit for name, limit in LIMITS.items())
            and self.other_choices == self.other_kept == 0
            and not self.wrong
        )


def compare(setup: Setup, topology: Topology, reference: Reference, ranks: list[Findings]) -> Comparison:
    lines = [(reference.metrics, ranks[0].metrics), ([reference.step_metrics], [ranks[0].step_metrics])]
    wrong = [
        f"rank {rank} has other metrics than rank 0"
        for rank, findings in enumerate(ranks)
        if (findings.metrics, findings.step_metrics) != (ranks[0].metrics, ranks[0].step_metrics)
    ]
    wrong += [
        f"{name}: no rank holds all of it"
        for name, gradient in reference.gradients.items()
        if not _covered(tuple(gradient.shape), [findings.slices[name] for findings in ranks])
    ]
    gradient_error, worst_gradient = max(
        (error, name) for findings in ranks for name, error in findings.gradient_errors.items()
    )
    others = reference.step_metrics.keys() - {*LOSSES, "grad_norm"}
    return Comparison(
        loss_error=_worst(*lines[0], LOSSES),
        metric_error=max(_worst(*pair, others) for pair in lines),
        grad_norm_error=max(
            abs(ours["grad_norm"] / line["grad_norm"] - 1)
            for pair in lines
            for line, ours in zip(*pair, strict=True)
        ),
        gradient_error=gradient_error,
        worst_gradient=worst_gradient,
        choices=sum(findings.choices for findings in ranks),
        near_ties=sum(findings.near_ties for findings in ranks),
        other_choices=sum(findings.other_choices for findings in ranks),
        other_kept=sum(findings.other_kept for findings in ranks),
        wrong=wrong,
    )


def _worst(reference: list[dict[str, Any]], ours: list[dict[str, Any]], names: Any) -> float:
    """Largest difference of these metrics; NaN differs from everything."""
    differences = [
        np.abs(np.subtract(line[name], other[name])).max()
        for line, other in zip(reference, ours, strict=True)
        for name in names
    ]
    return math.inf if np.isnan(differences).any() else float(np.max(differences))


def _covered(shape: tuple[int, ...], parts: Sequence[Slices]) -> bool:
    held = np.zeros(shape, bool)
    for part in set(parts):
        held[tuple(slice(*dim) for dim in part)] = True
    return bool(held.all())
