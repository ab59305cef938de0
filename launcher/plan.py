"""Plan a run before paying for it, without any device: `python -m openmoe.launcher.plan experiment=NAME
cluster=NAME [key=value ...]`, or `openmoe-plan`."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from openmoe.data.config import PathText
from openmoe.launcher.entry import run_command
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.plan_figure import draw
from openmoe.launcher.schema import Config
from openmoe.launcher.train import count_steps
from openmoe.model.accounting import count_flops
from openmoe.parallel.recompute import Recompute
from openmoe.parallel.topology import Topology, resolve
from openmoe.plan.cluster import ClusterConfig
from openmoe.plan.search import Candidate, Planner, Request

GIB, MIB = 2**30, 2**20
MORE_DEVICES = (2, 4, 8, 16, 32, 64)


class PlanConfig(BaseModel, strict=True, extra="forbid", frozen=True, allow_inf_nan=False):
    # Share of the positions that reach the head, in the phase with most of them.
    loss_share: float = Field(gt=0, le=1)
    # Layouts in the table.
    show: int = Field(ge=1, le=1000)
    # Folder for plan.json and plan.png.
    output: PathText | None


class PlanPage(Config):
    cluster: ClusterConfig
    plan: PlanConfig


def main() -> None:
    run_command(make_plan, PlanPage, "plan")


def make_plan(page: PlanPage) -> None:
    """Print the layouts that fit, fastest first, and all about the first of them.

    Degrees of the page other than 1 and a recomputation other than none are kept; parallel.shard pins the
    layout. Rows of a micro-batch are always looked for.
    Raises ConfigError where nothing fits, saying what would.
    """
    _check(page)
    request = Request(page.model, page.optim, page.train, page.parallel, page.plan.loss_share)
    found = look(Planner(request, page.cluster), page)
    fitting = [candidate for candidate in found if candidate.seconds is not None]
    if not fitting:
        raise ConfigError(_refusal(page, request, found))
    print("\n".join(_header(page)))
    print("\n".join(_table(page, fitting[: page.plan.show])))
    if len(fitting) > page.plan.show:
        print(f"  ... and {len(fitting) - page.plan.show} more that fit; {len(found) - len(fitting)} do not")
    print("\n".join(_details(page, fitting[0])))
    if page.plan.output is not None:
        folder = Path(page.plan.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_text(
            json.dumps([_record(page, each) for each in fitting], indent=1) + "\n"
        )
        draw(fitting[: page.plan.show], page.cluster, folder / "plan.png")
        print(f"\nwritten: {folder / 'plan.json'}, {folder / 'plan.png'}")


def _check(page: PlanPage) -> None:
    if page.parallel.engine != "torch":
        raise ConfigError(f"parallel.engine={page.parallel.engine}: plans know torch")
    precision = page.train.precision
    for key in ("flops_per_second", "peak_flops_per_second"):
        known = getattr(page.cluster, key)
        if precision not in known:
            has = ", ".join(sorted(known))
            raise ConfigError(f"cluster.{key}: no rate for train.precision={precision}; allowed: {has}")


def look(planner: Planner, page: PlanPage) -> list[Candidate]:
    """All candidates: those that fit, fastest first, then the others, the smallest first."""
    layouts = asked_for(planner, page)
    found, start = [], time.monotonic()
    for number, layout in enumerate(layouts, 1):
        found.append(planner.candidate(*layout))
        left = (time.monotonic() - start) / number * (len(layouts) - number)
        if sys.stderr.isatty():
            print(f"{number} of {len(layouts)} layouts, about {left:.0f} s left ", end="\r", file=sys.stderr)
    return sorted(found, key=_rank)


def asked_for(planner: Planner, page: PlanPage) -> list[tuple[Topology, Recompute]]:
    """The layouts that the page leaves open: where it names a degree or a recomputation, that one."""
    parallel = page.parallel
    if parallel.shard != -1:
        only = resolve(parallel, page.cluster.devices)
        planner.check(only)
        layouts = [(only, mode) for mode in planner.modes()]
    else:
        named = {key: getattr(parallel, key) for key in ("replicate", "tensor", "expert")}
        named = {key: degree for key, degree in named.items() if degree != 1}
        layouts = [
            (topology, mode)
            for topology, mode in planner.layouts()
            if all(getattr(topology, key) == degree for key, degree in named.items())
        ]
        if not layouts:
            degrees = " ".join(f"parallel.{key}={degree}" for key, degree in named.items())
            raise ConfigError(
                f"{degrees}: no layout of {page.cluster.devices} devices has it; allowed 1, which leaves it "
                f"open, or parallel.shard=N, which says all"
            )
    wanted = parallel.recompute
    return [layout for layout in layouts if wanted in ("none", layout[1])]


def _rank(candidate: Candidate) -> tuple[bool, float]:
    if candidate.seconds is None:
        return True, candidate.memory.total
    return False, candidate.seconds.total


def _refusal(page: PlanPage, request: Request, found: list[Candidate]) -> str:
    least, cluster = found[0], page.cluster
    room = (cluster.memory_bytes - cluster.reserved_bytes) / MIB
    what = (
        f"cluster.devices={cluster.devices}: the model does not fit; the least that one of {len(found)} "
        f"layouts needs is {least.memory.total / MIB:,.0f} MiB ({_layout(least)}); usable are {room:,.0f} MiB"
    )
    for factor in MORE_DEVICES:
        more = cluster.model_copy(update={"devices": factor * cluster.devices})
        planner = Planner(request, more)
        for topology, recompute in planner.layouts():
            if recompute == "full" and planner.candidate(topology, recompute).seconds is not None:
                return (
                    f"{what}; allowed: {more.devices} devices, where {_degrees(topology)} recompute=full fits"
                )
    return f"{what}; not even {MORE_DEVICES[-1]} times as many devices help"


def _header(page: PlanPage) -> list[str]:
    train, cluster = page.train, page.cluster
    room = (cluster.memory_bytes - cluster.reserved_bytes) / GIB
    return [
        f"{cluster.devices} devices of {room:.1f} usable GiB, {cluster.devices_per_node} a node; "
        f"{count_steps(page):,} updates of {train.global_batch_rows:,} rows of {train.seq_len:,}, "
        f"{train.precision}",
        "",
        f"  {'replicate shard tensor expert':<32}{'recompute':<11}{'rows x blocks':>14}{'GiB':>7}"
        f"{'step s':>9}{'tokens/s/device':>17}{'MFU':>7}{'days':>8}{'cost':>12}",
    ]


def _table(page: PlanPage, candidates: list[Candidate]) -> list[str]:
    rows = []
    for record in (_record(page, each) for each in candidates):
        degrees = "".join(f"{record[key]:>7}" for key in ("replicate", "shard", "tensor", "expert"))
        blocks = f"{record['micro_batch_rows']} x {record['micro_batches']}"
        cost = "" if record["cost"] is None else f"{record['cost']:,.0f}"
        rows.append(
            f"  {degrees:<32}{record['recompute']:<11}{blocks:>14}"
            f"{record['memory_bytes']['total'] / GIB:>7.1f}"
            f"{record['step_seconds']:>9.2f}{record['tokens_per_second_per_device']:>17,.0f}{record['mfu']:>7.1%}"
            f"{record['days']:>8.1f}{cost:>12}"
        )
    return rows


def _record(page: PlanPage, candidate: Candidate) -> dict[str, Any]:
    """One layout with all its figures."""
    step, memory, seconds = candidate.step, candidate.memory, candidate.seconds
    assert seconds is not None
    tokens = page.train.global_batch_rows * page.train.seq_len
    useful = count_flops(page.model, page.train.seq_len).of_step(tokens, tokens * page.plan.loss_share)
    devices = page.cluster.devices
    hours = seconds.total * count_steps(page) / 3600
    price = page.cluster.price_per_device_hour
    return {
        **{key: getattr(step.topology, key) for key in ("replicate", "shard", "tensor", "expert")},
        "recompute": step.parallel.recompute,
        "micro_batch_rows": step.micro_batch_rows,
        "micro_batches": step.micro_batches,
        "memory_bytes": asdict(memory) | {"total": memory.total},
        "step_seconds": seconds.total,
        "compute_seconds": seconds.compute,
        "sent_seconds": seconds.sent,
        "waiting_seconds": seconds.waiting,
        "tokens_per_second_per_device": tokens / seconds.total / devices,
        "mfu": useful / seconds.total / devices / page.cluster.peak_flops_per_second[page.train.precision],
        "days": hours / 24,
        "cost": None if price is None else hours * devices * price,
    }


def _details(page: PlanPage, best: Candidate) -> list[str]:
    record = _record(page, best)
    memory = {key: size / GIB for key, size in record["memory_bytes"].items() if size}
    compute = {key: value for key, value in record["compute_seconds"].items() if value}
    return [
        "",
        "The first of them, GiB of a device and seconds of a step",
        *_columns(
            memory, compute | {"waiting for others": record["waiting_seconds"]}, record["sent_seconds"]
        ),
        "",
        f"  parallel.replicate={record['replicate']} parallel.shard={record['shard']} "
        f"parallel.tensor={record['tensor']} parallel.expert={record['expert']} "
        f"parallel.recompute={record['recompute']} train.micro_batch_rows={record['micro_batch_rows']}",
    ]


def _columns(*columns: dict[str, float]) -> list[str]:
    """Side by side; the last one is what is sent, hidden behind compute or not."""
    names = ("memory", "computed", "sent")
    cells = [
        [
            f"{name:<24}{'':>9}",
            *(f"{key.replace('_', ' '):<24.24}{value:>9.2f}" for key, value in column.items()),
        ]
        for name, column in zip(names, columns, strict=True)
    ]
    height = max(map(len, cells))
    padded = [column + [" " * 33] * (height - len(column)) for column in cells]
    return [f"  {'    '.join(row)}".rstrip() for row in zip(*padded, strict=True)]


def _layout(candidate: Candidate) -> str:
    return f"{_degrees(candidate.step.topology)} recompute={candidate.step.parallel.recompute}"


def _degrees(topology: Any) -> str:
    return " ".join(f"{key}={getattr(topology, key)}" for key in ("replicate", "shard", "tensor", "expert"))


if __name__ == "__main__":
    main()
