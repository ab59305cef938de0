"""The model of a checkpoint, to generate, evaluate or analyse with. All its files are verified;
nothing but the model is loaded."""

from pathlib import Path

import torch

from openmoe.checkpoint.manifest import Manifest
from openmoe.checkpoint.origin import model_config_of
from openmoe.checkpoint.state import model_tensors
from openmoe.checkpoint.storage import read_checkpoint, verify_checkpoint
from openmoe.model.decoder import Decoder
from openmoe.model.generation import prepare_weights


def load_model(folder: Path, compute_dtype: torch.dtype, device: torch.device) -> tuple[Decoder, Manifest]:
    """The whole model on one device, not for training: weights are stored in the type they are used in.

    Raises CheckpointError where the checkpoint is damaged, or holds no model that this program knows.
    """
    manifest = verify_checkpoint(folder)
    config = model_config_of(folder, manifest)
    with torch.device("meta"):
        model = Decoder(config, compute_dtype=compute_dtype)
    stored = manifest.tensors.get("model/embedding.weight")
    model = model.to(getattr(torch, stored.dtype) if stored else torch.float32).to_empty(device="cpu")
    read_checkpoint(folder, manifest, model_tensors(model), manifest.model)
    prepare_weights(model)
    return model.to(device).eval(), manifest
