"""Continue a sequence token by token, the whole prefix again at each step."""

from collections.abc import Sequence

import torch

from openmoe.model.batch import Batch
from openmoe.model.decoder import Decoder


@torch.no_grad()
def continue_tokens(
    model: Decoder,
    prompt: Sequence[int],
    new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    end_token: int = 1,
) -> list[int]:
    """Up to `new_tokens` tokens after `prompt`, before the first `end_token`; temperature 0 takes the
    likeliest.

    The row starts with token 0, as every training row does. Capacity is that of evaluation.
    """
    model.eval()
    device = model.head_weight.device
    tokens = [0, *prompt]
    for _ in range(new_tokens):
        inputs = torch.tensor([tokens], device=device)
        targets = torch.cat((inputs[:, 1:], torch.ones_like(inputs[:, :1])), 1)  # no position is padding
        hidden = model(Batch(inputs, targets, torch.ones_like(inputs))).hidden
        logits = model.logits(hidden[0, -1])
        if temperature == 0:
            token = int(logits.argmax())
        else:
            probs = (logits / temperature).softmax(-1).cpu()
            token = int(torch.multinomial(probs, 1, generator=generator))
        if token == end_token:
            break
        tokens.append(token)
    return tokens[1 + len(prompt) :]
