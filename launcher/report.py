"""What a run did, as a table, two samples and a picture: `python -m openmoe.launcher.report run.dir=DIR`."""

import json
from pathlib import Path
from typing import Any

import torch

from openmoe.checkpoint.manager import find_checkpoint, load_checkpoint
from openmoe.checkpoint.state import model_tensors
from openmoe.data.loader import Loader
from openmoe.data.prepare import PreparedData, prepare
from openmoe.data.statistics import bigram_cross_entropy, unigram_entropy
from openmoe.data.stream import TokenStream
from openmoe.launcher.entry import read_config, run_command
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.figure import draw
from openmoe.launcher.schema import Config
from openmoe.launcher.train import build_loader, model_identity, source_names
from openmoe.model.decoder import Decoder
from openmoe.model.generation import generate
from openmoe.model.sampling import SamplingConfig
from openmoe.parallel.build import build_decoder

# One sentence and one function for the model to continue.
PROMPTS = {
    "text": "The for statement is used to iterate over the elements of a",
    "code": 'def read_lines(path):\n    """Return the lines of a file."""\n',
}
SAMPLE_TOKENS = 60
# Of training text that the bigram model is counted on.
MOST_BIGRAM_TOKENS = 20_000_000
SAMPLING = SamplingConfig(temperature=0.6)


def main() -> None:
    run_command(lambda config: report(Path(config.run.dir)), Config, "config")


def report(run_dir: Path) -> None:
    """Print the tables and samples of the run in `run_dir` and write report.png there.

    Raises ConfigError where the folder holds no run with at least one validation.
    """
    lines = read_metrics(run_dir)
    config = read_config(run_dir / "config.yaml")
    data = prepare(config.data, config.model.vocab_size, source_names(config))
    loader = build_loader(config, data)
    bars = entropies(config, data, loader)
    print(loss_table(lines, source_names(config), bars))
    if config.model.moe_layers:
        print(router_table(lines, config))
    print_samples(config, data, run_dir)
    picture = run_dir / "report.png"
    draw(lines, config, bars, picture)
    print(f"picture: {picture}")
    loader.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"run.dir={run_dir}: no run there (metrics.jsonl is missing)")
    # A line without an end is one that is being written, or that a kill cut off.
    text = path.read_text().splitlines(keepends=True)
    lines = [json.loads(line) for line in text if line.endswith("\n")]
    if not any(key.startswith("eval/causal_lm/") for line in lines for key in line):
        raise ConfigError(f"run.dir={run_dir}: the run has no validation yet; nothing to report")
    return lines


def entropies(config: Config, data: PreparedData, loader: Loader) -> dict[str, dict[str, float]]:
    """Per source, nats per token of the run's own validation rows: unigram shares of these very tokens, and a
    bigram model counted on the source's training text."""
    bars = {}
    for source in source_names(config):
        rows = loader.validation_rows("causal_lm", source, config.train.validation_rows)
        tokens = rows["target_tokens"][rows["loss_weights"] > 0]
        stream = TokenStream(source, data.sources[source].splits["train"], seed=0, chunk_tokens=None)
        train = stream.read(0, min(stream.epoch_tokens(True), MOST_BIGRAM_TOKENS), join_eos=True)
        bars[source] = {
            "unigram": unigram_entropy(tokens),
            "bigram": bigram_cross_entropy(train, tokens, data.tokenizer.size),
        }
    return bars


def loss_table(lines: list[dict[str, Any]], sources: list[str], bars: dict[str, dict[str, float]]) -> str:
    """Held-back causal LM loss and accuracy per source at the last validation of each phase."""
    ends = _last_validation_of_phases(lines)
    head = f"{'held-back text':<16}{'unigram':>9}{'bigram':>9}"
    for line in ends:
        head += f"{'loss @' + str(line['step']):>13}{'accuracy':>10}"
    rows = [head]
    for source in sources:
        row = f"{source:<16}{bars[source]['unigram']:>9.3f}{bars[source]['bigram']:>9.3f}"
        for line in ends:
            row += f"{line[f'eval/causal_lm/{source}/loss']:>13.3f}"
            row += f"{line[f'eval/causal_lm/{source}/accuracy']:>10.3f}"
        rows.append(row)
    phases = ", ".join(f"@{line['step']} phase {line['phase']} ({line['objective']})" for line in ends)
    return "\n" + "\n".join(rows) + f"\ncausal LM loss in nats per token; {phases}"


def router_table(lines: list[dict[str, Any]], config: Config) -> str:
    """Load, entropy and drops of each MoE layer at the first and last step."""
    columns = ("load_max_over_mean", "load_cv", "dead_experts", "entropy", "dropped_first", "dropped_second")
    rows = [f"\n{'expert load':<16}" + "".join(f"{name:>20}" for name in columns)]
    for layer in config.model.moe_layers:
        row = f"layer {layer:<10}"
        for name in columns:
            key = f"router/layer{layer:02d}/{name}"
            values = [f"{line[key]:.2f}" for line in (lines[0], lines[-1]) if key in line]
            row += f"{' -> '.join(values):>20}"
        rows.append(row)
    return "\n".join(rows)


def print_samples(config: Config, data: PreparedData, run_dir: Path) -> None:
    """The newest checkpoint continues PROMPTS."""
    newest = find_checkpoint("auto", run_dir)
    if newest is None:
        return
    model = load_model(config, newest)
    prompts = [data.tokenizer.encode(prompt) for prompt in PROMPTS.values()]
    continued = generate(model, prompts, SAMPLE_TOKENS, SAMPLING, config.run.seed)
    for (kind, prompt), tokens, new in zip(PROMPTS.items(), prompts, continued, strict=True):
        text = data.tokenizer.decode_after(tokens, new.tokens)
        print(f"\n--- {kind}, continued at |\n{prompt}|{text}")
    print()


def load_model(config: Config, checkpoint: Path) -> Decoder:
    """The model of a checkpoint on the CPU, without optimizer."""
    model = build_decoder(config.model, config.train.precision, torch.device("cpu"), config.run.seed)
    load_checkpoint(checkpoint, model_tensors(model), model_identity(config))
    return model


def _last_validation_of_phases(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = {}
    for line in lines:
        if any(key.startswith("eval/causal_lm/") for key in line):
            last[line["phase"]] = line
    return list(last.values())


if __name__ == "__main__":
    main()
