"""What each objective and packing costs and gains in training: loss tokens a second, beside each other.

    python -m benchmarks.packing            # about 4 minutes on two cores

One model (4 layers, 8 experts, width 128, vocabulary 4480), a step of 32,768 positions, examples of at most
2048. Rounds are interleaved, so that a disturbance falls on all; figures are medians of full steps (forward,
backward, Adafactor), text and tokenizer are those of the demo. Prints a table and writes it to
benchmarks/results/packing.txt. A dropless row does the same work for every token, so that it compares packing
alone: with a capacity, denser rows drop more (docs/data.md).
"""

import platform
import statistics
import time
from pathlib import Path

import torch

from openmoe.data.loader import Loader
from openmoe.data.prepare import prepare
from openmoe.launcher.entry import load_config
from openmoe.launcher.schema import Config
from openmoe.launcher.train import build_loader, longest_segment, source_names
from openmoe.optim.build import build_optimizer
from openmoe.parallel.build import build_decoder
from openmoe.parallel.ranks import OneProcess
from openmoe.train.step import micro_batches, train_step

ROUNDS = 3
POSITIONS = 32_768
COUNTED_STEPS = 200
RESULT = Path(__file__).resolve().parent / "results" / "packing.txt"
LONG_ROWS = ("data.packing=dense", f"train.seq_len={POSITIONS}", "data.example_tokens=2048")
DROPLESS = ("model.dropless=true",)
CASES: dict[str, tuple[str, ...]] = {
    "causal_lm": (),
    "prefix_lm": (),
    "span_corruption": (),
    "ul2, released": (),
    "ul2, released, no mode strings": ("data.mode_strings=false",),
    "ul2, released, bidirectional inputs": ("model.attention=prefix",),
    "ul2, dense": LONG_ROWS,
    "ul2, dense, bidirectional inputs": (*LONG_ROWS, "model.attention=prefix"),
    "ul2, released, dropless": DROPLESS,
    "ul2, dense, dropless": (*LONG_ROWS, *DROPLESS),
}


class Case:
    """One configuration in training."""

    def __init__(self, objective: str, overrides: tuple[str, ...]) -> None:
        seq_len = POSITIONS if LONG_ROWS[0] in overrides else 2048
        self.config: Config = load_config(
            [
                "experiment=tiny",
                "run.dir=unused",
                f"train.seq_len={seq_len}",
                f"train.global_batch_rows={POSITIONS // seq_len}",
                "train.validation_rows=0",
                f"curriculum=[{{mix: {{code: 0.5, docstrings: 0.4, manual: 0.1}}, objective: {objective}}}]",
                *overrides,
            ]
        )
        data = prepare(self.config.data, self.config.model.vocab_size, source_names(self.config))
        self.loader: Loader = build_loader(self.config, data)
        device = torch.device("cpu")
        self.model = build_decoder(self.config.model, "fp32", device, seed=0)
        self.optimizer = build_optimizer(self.config.optim, self.model.named_parameters())
        self.seconds: list[float] = []
        # Of many more rows than are trained on: a step of 16 examples holds more or less of each denoiser.
        batches = [next(self.loader) for _ in range(COUNTED_STEPS)]
        self.fill = sum(batch.nonpad_tokens for batch in batches) / (COUNTED_STEPS * POSITIONS)
        self.loss_share = sum(batch.loss_tokens for batch in batches) / (COUNTED_STEPS * POSITIONS)

    def step(self) -> None:
        start = time.perf_counter()
        batch = next(self.loader)
        micro = micro_batches(batch.arrays, -1, torch.device("cpu"), longest_segment(self.config))
        train_step(
            self.model,
            self.optimizer,
            micro,
            batch.loss_tokens,
            0.01,
            self.config.train,
            OneProcess(self.model),
        )
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    torch.set_num_threads(2)
    cases = {name: Case(name.split(",")[0], overrides) for name, overrides in CASES.items()}
    for done in range(ROUNDS + 1):
        for name, case in cases.items():
            case.step()
            if not done:
                case.seconds.clear()  # the first step allocates
            print(f"round {done} of {ROUNDS}: {name}", flush=True)
    head = f"{'':38}{'fill':>7}{'loss share':>12}{'s a step':>10}{'positions/s':>13}{'loss tokens/s':>15}"
    lines = [f"{platform.processor() or platform.machine()}, torch {torch.__version__}, 2 threads", head]
    for name, case in cases.items():
        fill, share = case.fill, case.loss_share
        seconds = statistics.median(case.seconds)
        speed = POSITIONS / seconds
        lines.append(f"{name:38}{fill:7.3f}{share:12.3f}{seconds:10.2f}{speed:13,.0f}{speed * share:15,.0f}")
    print("\n".join(lines))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
