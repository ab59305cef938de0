"""What a model reads."""

from dataclasses import dataclass

from torch import Tensor

from openmoe.model.segments import SegmentTiles


@dataclass(frozen=True)
class Batch:
    """Rows of packed examples; every tensor is `[rows, seq_len]`.

    `target_tokens` are the tokens to predict (0 = padding), `input_tokens` the same shifted right with 0 at
    the start of each example. `segment_ids` number the examples of a row from 1 (0 = padding); None says that
    no row holds more than one example, so a causal mask alone keeps examples apart. `tiles` cut long rows
    into their examples for attention; what a model makes of real tokens is the same with and without them.
    """

    input_tokens: Tensor
    target_tokens: Tensor
    loss_weights: Tensor
    segment_ids: Tensor | None = None
    prefix_mask: Tensor | None = None  # True inside an example's inputs; read when attention is `prefix`
    source_ids: Tensor | None = None  # index of the data source, -1 = padding; read by routing traces
    tiles: SegmentTiles | None = None  # not used where a model attends to padding or routes it
