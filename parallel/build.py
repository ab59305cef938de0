"""From a config to a model on its device."""

import torch

from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder
from openmoe.model.init import initialise

# precision -> (dtype of parameters and optimizer state, dtype of activations)
DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.float32, torch.bfloat16),
}


def build_decoder(config: ModelConfig, precision: str, device: torch.device, seed: int) -> Decoder:
    """A Decoder with its initial values; nothing is materialised before its final place is known."""
    parameter_dtype, compute_dtype = DTYPES[precision]
    with torch.device("meta"):
        model = Decoder(config, compute_dtype=compute_dtype)
    model = model.to(parameter_dtype).to_empty(device=device)
    initialise(model, config, seed)
    return model
