"""The OpenMoE decoder: dense blocks with a MoE block every `moe_every` layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmoe.model.batch import Batch
from openmoe.model.config import ModelConfig
from openmoe.model.dispatch import DISPATCHERS, Aside, TokenDispatcher
from openmoe.model.groups import expert_capacity
from openmoe.model.kv_cache import KVCache
from openmoe.model.layers import (
    Attend,
    Attention,
    Embedding,
    FeedForward,
    Linear,
    Remember,
    RMSNorm,
    fused_attention,
    rotary_table,
)
from openmoe.model.losses import HeadLoss, linear_cross_entropy
from openmoe.model.moe import MoELayer, RoutingTrace, RowGroups, routing_trace
from openmoe.model.router import RouterStatistics, Routing, TopKRouter
from openmoe.model.segments import SegmentTiles
from openmoe.model.tensor_ranks import ONE_RANK, TensorRanks

# Routing of rows that are generated. none: nothing is dropped. model: a row's tokens that come at a time are
# one group with the model's capacity in evaluation, so a prompt is a group and then each token by itself.
GenerationCapacity = Literal["none", "model"]


class DecoderOutput(NamedTuple):
    hidden: Tensor  # [rows, seq_len / ranks, d_model], what the head multiplies
    router: list[RouterStatistics]  # one per MoE layer
    traces: list[RoutingTrace]  # on request


@dataclass(frozen=True)
class Positions:
    """What every block needs to know about the rows; computed once a forward."""

    rotary: tuple[Tensor, Tensor]
    real: Tensor  # [rows, seq_len] bool, False = padding
    mask: Tensor | None  # [rows, 1, seq_len, seq_len] bool, or of the tiles; None = plain causal
    query_mask: Tensor | None  # [rows, seq_len] bool, False = sees no key; None = every query sees one
    input_mask: Tensor | None  # [rows, seq_len / ranks, 1], 0/1 factor of every sub-layer's input
    tiles: SegmentTiles | None  # where attention runs over segments instead of rows
    row_groups: RowGroups | None = None  # generation's routing groups; None = the model's


class Block(nn.Module):
    """Dense (paper Eq. 3): x += Attn(norm(x)); x += FFN(norm(x)). A MoE block adds experts to it (Eq. 4).

    Tensor ranks hold x, the norms' and the experts' inputs and outputs as slices of the sequence; attention
    and FFN see whole rows and return terms of a sum.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        dispatcher: TokenDispatcher,
        ranks: TensorRanks,
        attend: Attend,
    ) -> None:
        super().__init__()
        self.ranks = ranks
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, attend)
        self.moe = MoELayer(config, dispatcher, ranks) if config.is_moe_layer(layer) else None
        self.shared_norm = config.residual == "parallel_shared_norm"
        if self.moe is not None:
            self.moe_norm = RMSNorm(config.d_model, config.norm_eps)
        if self.moe is None or not self.shared_norm:
            self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(
        self, x: Tensor, at: Positions, remember: Remember | None = None
    ) -> tuple[Tensor, RouterStatistics | None, Routing | None]:
        h = self.ranks.gather_sequence(_masked(self.attention_norm(x), at))
        y = self.attention(h, at.rotary, at.mask, at.query_mask, at.tiles, remember)
        x = x + self.ranks.scatter_sequence(y)
        if self.moe is None:
            return x + self._ffn(_masked(self.ffn_norm(x), at)), None, None
        h = _masked(self.moe_norm(x), at)
        if self.shared_norm:
            ffn = Aside(lambda: self._ffn(h))
            y, statistics, routing = self.moe(h, at.real, at.row_groups, ffn)
            return x + y + ffn.result, statistics, routing
        y, statistics, routing = self.moe(h, at.real, at.row_groups)
        x = x + y
        return x + self._ffn(_masked(self.ffn_norm(x), at)), statistics, routing

    def _ffn(self, h: Tensor) -> Tensor:
        return self.ranks.scatter_sequence(self.ffn(self.ranks.gather_sequence(h)))


class Decoder(nn.Module):
    """Token embedding, blocks, final norm and head.

    Args:
        config: shape and routing.
        dispatcher: how tokens reach their experts; None takes `config.dispatch` on one device.
        ranks: those that share the rows of a batch and the matrices.
        head_loss: how `token_losses` turns hidden states into losses.
        attend: how attention is computed.

    Parameters come uninitialised; `openmoe.model.init.initialise` fills them. `train()` and `eval()` choose
    the capacity factor. The dtype of the activations is `compute_dtype`; parameters keep their own.
    """

    def __init__(
        self,
        config: ModelConfig,
        dispatcher: TokenDispatcher | None = None,
        compute_dtype: torch.dtype = torch.float32,
        ranks: TensorRanks = ONE_RANK,
        head_loss: HeadLoss = linear_cross_entropy,
        attend: Attend = fused_attention,
    ) -> None:
        super().__init__()
        self.config = config
        self.ranks = ranks
        self.head_loss = head_loss
        self.compute_dtype = compute_dtype
        dispatcher = dispatcher or DISPATCHERS[config.dispatch]
        self.embedding = Embedding(config.vocab_size, config.d_model, ranks)
        self.layers = nn.ModuleList(
            Block(config, i, dispatcher, ranks, attend) for i in range(config.n_layers)
        )
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tied_head else Linear(config.d_model, config.vocab_size)

    def forward(self, batch: Batch, trace: bool = False) -> DecoderOutput:
        """Final hidden states and router statistics of a batch; the logits are `head_weight` times the hidden
        states, left to the loss, which never holds them."""
        x = self.embedding(batch.input_tokens).to(self.compute_dtype)
        at = self._positions(batch, x)
        statistics, traces = [], []
        for i, block in enumerate(self.layers):
            x, block_statistics, routing = block(x, at)
            if routing is not None:
                statistics.append(block_statistics)
                if trace:
                    traces.append(routing_trace(i, routing, batch, self.ranks))
        return DecoderOutput(self._head_input(x, at), statistics, traces)

    @torch.no_grad()
    def extend(
        self,
        cache: KVCache,
        tokens: Tensor,
        counts: Sequence[int],
        prefix: Sequence[int] | None = None,
        capacity: GenerationCapacity = "none",
    ) -> Tensor:
        """The next tokens of rows whose earlier ones are in `cache`; it takes them in. No gradient passes.

        What comes out for a row's tokens depends on these and its earlier ones only: not on other rows, not
        on padding and, where nothing is dropped, not on how many come at a time.

        Args:
            tokens: int64 `[rows, new]`; the first token of a row is 0, as in training.
            counts: how many of them each row has; the rest behind them is padding, whatever it holds.
            prefix: positions of each row, its first ones, that see each other; read when attention is
                `prefix`, and they must come all at once.
            capacity: see GenerationCapacity.

        Returns:
            Final hidden states `[rows, new, d_model]`, undefined at padding.

        Raises ValueError where tensor ranks share rows, or where the cache has no room.
        """
        if self.ranks.size > 1:
            raise ValueError(
                f"generation on {self.ranks.size} tensor ranks: allowed where one has all of them"
            )
        if self.config.attention == "causal":
            prefix = None
        columns = cache.columns(counts, prefix)
        row_groups = RowGroups(None)
        if capacity == "model":
            room = [expert_capacity(self.config, count, training=False) for count in counts]
            row_groups = RowGroups(torch.tensor(room, device=tokens.device))
        at = Positions(columns.rotary, columns.real, columns.mask, None, None, None, row_groups)
        x = self.embedding(tokens).to(self.compute_dtype)
        for i, block in enumerate(self.layers):
            x, _, _ = block(x, at, partial(cache.append, i, columns))
        cache.advance(counts)
        return self._head_input(x, at)

    def _head_input(self, x: Tensor, at: Positions) -> Tensor:
        hidden = _masked(self.final_norm(x), at)
        # Embeddings have unit variance; without the factor logits would grow with d_model.
        return hidden / math.sqrt(self.config.d_model) if self.head is None else hidden

    @property
    def head_weight(self) -> Tensor:
        """`[vocab_size / ranks, d_model]`."""
        return self.embedding.weight if self.head is None else self.head.weight

    def token_losses(
        self, hidden: Tensor, positions: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy, log-partition and correctness of the tokens at `positions` of the flattened rows.

        See `linear_cross_entropy`; hidden as `forward` returns it, the rest `[tokens]` int64. Without
        positions of all tokens, and the targets, like the results, are `[rows, seq_len]`.
        """
        chosen = self.ranks.gather_sequence(hidden)
        if positions is not None:
            chosen = chosen.flatten(0, 1).index_select(0, positions)
        return self.head_loss(chosen, self.head_weight, targets, self.ranks)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., vocab_size]` in float32 or wider, for generation and analysis.

        Raises ValueError where tensor ranks share rows and vocabulary.
        """
        if self.ranks.size > 1:
            raise ValueError(f"logits of {self.ranks.size} tensor ranks: allowed where one has all of them")
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.to(wide) @ self.head_weight.to(wide).t()

    def freeze_routers(self) -> None:
        """From now on the routers' weights get no gradient; tokens are still routed by them."""
        for module in self.modules():
            if isinstance(module, TopKRouter):
                module.frozen = True

    def _positions(self, batch: Batch, x: Tensor) -> Positions:
        seq_len = batch.input_tokens.shape[1]
        # Tiles hold no padding: where it sees a row's other columns, and that shows, rows keep their mask.
        tiles = None if self.config.mask_padding or self.config.route_padding else batch.tiles
        # In a tile positions count from the segment's start. Scores know differences only, and small angles
        # round less: the same example gives the same numbers anywhere in a row.
        width = seq_len if tiles is None else tiles.positions.shape[1]
        rotary = rotary_table(width, self.config.head_dim, self.config.rope_base, x)
        real = batch.target_tokens > 0
        mask = _attention_mask(self.config, batch) if tiles is None else _tile_mask(self.config, batch, tiles)
        if not self.config.mask_padding:
            return Positions(rotary, real, mask, None, None, tiles)
        # The original's logit mask: real where the input is a token, or the next input is, or at the start
        # of the row (facts 1.8). So the column after a sequence, whose input is EOS, counts as real.
        tokens = batch.input_tokens > 0
        used = tokens | F.pad(tokens[:, 1:], (0, 1)) | (torch.arange(seq_len, device=x.device) == 0)
        input_mask = self.ranks.own_slice(used)[..., None].to(x.dtype)
        return Positions(rotary, used, mask, real, input_mask, None)


def _masked(x: Tensor, at: Positions) -> Tensor:
    return x if at.input_mask is None else x * at.input_mask


def _attention_mask(config: ModelConfig, batch: Batch) -> Tensor | None:
    """Which keys each query sees, bool `[rows, 1, seq_len, seq_len]`; None where plain causal says it all."""
    prefix = batch.prefix_mask if config.attention == "prefix" else None
    if batch.segment_ids is None and prefix is None and not config.mask_padding:
        return None
    real = batch.target_tokens > 0
    seq_len = real.shape[1]
    mask = torch.ones(seq_len, seq_len, dtype=torch.bool, device=real.device).tril()[None]
    if prefix is not None:
        mask = mask | (prefix[:, :, None] & prefix[:, None, :])
    if batch.segment_ids is not None:
        mask = mask & (batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :])
    if config.mask_padding:
        # No key is padding; a padding query sees none (see query_mask), here it may have all: a row of
        # False would give NaN in some kernels.
        mask = (mask & real[:, None, :]) | ~real[:, :, None]
    return mask[:, None]


def _tile_mask(config: ModelConfig, batch: Batch, tiles: SegmentTiles) -> Tensor | None:
    """Which keys each query of a segment sees, bool `[segments, 1, longest, longest]`; None = plain causal.

    Columns behind a segment's end come after its last query, so the causal mask hides them."""
    if config.attention == "causal" or batch.prefix_mask is None:
        return None
    prefix = tiles.cut(batch.prefix_mask[..., None]).squeeze(-1)
    causal = prefix.new_ones(prefix.shape[1], prefix.shape[1]).tril()
    return (causal | (prefix[:, :, None] & prefix[:, None, :]))[:, None]
