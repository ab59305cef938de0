"""Parts of a step by the modules that do them: what plans and profiles sort operations by."""

from torch import nn

from openmoe.model.decoder import Block

# End of a module's path -> part of the step that it and what is inside it belong to. What lies outside of all
# of them is head and loss.
PARTS = {
    "attention": "attention",
    "ffn": "FFN",
    "experts": "experts",
    "router": "router",
    "moe": "dispatch",
    "_norm": "norms and residuals",
    "embedding": "embedding",
}
BLOCK = "norms and residuals"
HEAD = "head and loss"


def modules_by_part(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules that stand for a part, each with its name; they may lie inside each other."""
    found = []
    for path, module in model.named_modules():
        part = next((part for ending, part in PARTS.items() if path.endswith(ending)), None)
        if part and not path.startswith("final"):
            found.append((module, part))
        elif isinstance(module, Block):
            found.append((module, BLOCK))
    return found
