"""Take weights of others in: `python -m openmoe.launcher.import_weights weights=DIR to=DIR`.

What comes out is a checkpoint of weights alone: a run starts from it with `checkpoint.initialise_from=DIR`.
"""

import math
import time
from pathlib import Path

from pydantic import BaseModel

from openmoe.checkpoint.importing import Foreign, model_for_t5x, open_released, open_t5x
from openmoe.checkpoint.released_config import LossWeights, Provenance
from openmoe.checkpoint.weights import write_weights
from openmoe.data.config import DataConfig, PathText
from openmoe.data.shards import TOKENIZER
from openmoe.data.tokenizer import load_tokenizer
from openmoe.launcher.entry import run_command
from openmoe.launcher.errors import ConfigError
from openmoe.model.config import ModelConfig


class ImportPage(BaseModel, strict=True, extra="forbid", frozen=True):
    # A folder in the released format or openmoe-pt's, or a flat file of t5x tensors.
    weights: PathText
    # Folder that receives step_N.
    to: PathText
    # Of t5x tensors; the folders have a config.json.
    model: ModelConfig | None
    # A sentencepiece model, where the folder has none.
    tokenizer: PathText | None


def main() -> None:
    run_command(import_weights, ImportPage, "import_weights")


def import_weights(page: ImportPage) -> None:
    """Look through all of it, write the checkpoint, say what it is."""
    begin = time.monotonic()
    found = _open(page)
    files = found.other_files
    if page.tokenizer is not None:
        tokenizer = load_tokenizer(page.tokenizer, "tokenizer")
        if tokenizer.size > found.provenance.model.vocab_size:
            raise ConfigError(
                f"tokenizer={page.tokenizer}: {tokenizer.size} ids with its sentinels, and the model's "
                f"vocabulary has {found.provenance.model.vocab_size} rows"
            )
        files = files | {TOKENIZER: tokenizer.model}
    provenance = found.provenance
    model = provenance.model.model_dump(exclude={"dispatch"})
    folder = Path(page.to) / f"step_{provenance.step}"
    write_weights(
        folder,
        found.tensors,
        step=provenance.step,
        tokens_seen=provenance.tokens_seen,
        model=model,
        metadata={
            "imported": found.format,
            # The same places as in a run's own checkpoint.
            "config": {
                "model": provenance.model.model_dump(),
                "train": provenance.loss.model_dump(),
                "data": DataConfig().model_dump(),
            },
        },
        other_files=files,
    )
    elements = sum(math.prod(tensor.shape) for tensor in found.tensors)
    tokenizer_line = "with its tokenizer" if files else "no tokenizer there: give one with tokenizer=FILE"
    print(f"{folder}: {elements:,} parameters from {page.weights} ({found.format}), {tokenizer_line}")
    print(f"start a run from it: checkpoint.initialise_from={page.to} ({time.monotonic() - begin:.0f} s)")


def _open(page: ImportPage) -> Foreign:
    path = Path(page.weights)
    if path.is_dir():
        if page.model is not None:
            raise ConfigError("model: allowed for t5x tensors; a folder has a config.json")
        return open_released(path)
    if not path.exists():
        raise ConfigError(f"weights={page.weights}: no such file or folder")
    if page.model is None:
        raise ConfigError(f"model: missing; {page.weights} holds tensors alone: give model=NAME")
    model_for_t5x(page.model)
    return open_t5x(path, Provenance(model=page.model, loss=LossWeights(), step=0, tokens_seen=0))


if __name__ == "__main__":
    main()
