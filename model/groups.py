"""Routing groups: the unit of capacity, priority, dropping and router losses (facts 2.2, 2.3).

A group made of whole rows does not depend on how the batch is laid out over devices or micro-batches; the
original's rule does, and so does the one of its port to PyTorch; both are kept for parity.
"""

import math
from dataclasses import dataclass

from openmoe.model.config import ModelConfig


@dataclass(frozen=True)
class Groups:
    num_groups: int
    tokens_per_group: int
    padded_seq_len: int  # rows are zero-padded to this length before they are cut into groups


def routing_groups(config: ModelConfig, rows: int, seq_len: int, training: bool) -> Groups:
    """How `rows` rows of `seq_len` tokens are cut into groups.

    Raises ValueError in training where group_rule is `rows` and the rows do not make whole groups; elsewhere
    (a single prompt) groups are as large as divides the rows.
    """
    if config.group_rule == "rows":
        group_rows = math.gcd(rows, config.group_rows)
        if training and group_rows != config.group_rows:
            raise ValueError(
                f"model.group_rows={config.group_rows}: {rows} rows of a micro-batch do not make whole "
                f"routing groups; allowed: a divisor of {rows}"
            )
        return Groups(rows // group_rows, group_rows * seq_len, seq_len)
    if config.group_rule == "hugging_face":
        return Groups(1, rows * seq_len, seq_len)
    return _flaxformer_groups(rows, seq_len, config.group_tokens, config.num_experts)


def _flaxformer_groups(rows: int, seq_len: int, max_group_tokens: int, min_groups: int) -> Groups:
    """The smallest number of equal groups that is a multiple of min_groups and keeps each within the maximum.

    Rows are first padded until their tokens divide by min_groups. (flaxformer moe_layers, facts 2.3;
    min_groups = expert replicas * experts, one replica here.)
    """
    padded = seq_len
    while rows * padded % min_groups:
        padded += 1
    tokens = rows * padded
    num_groups = max(tokens // max_group_tokens, min_groups)
    while tokens % num_groups or num_groups % min_groups:
        num_groups += 1
    return Groups(num_groups, tokens // num_groups, padded)


def expert_capacity(config: ModelConfig, tokens_per_group: int, training: bool) -> int:
    """Slots of one expert in one group; Python's round, half to even, as the original (facts 2.2), or the
    PyTorch port's whole even number.

    A dropless layer has room for the whole group.
    """
    if config.dropless:
        return tokens_per_group
    factor = config.capacity_factor_train if training else config.capacity_factor_eval
    demand = tokens_per_group * (config.top_k if config.capacity_includes_k else 1)
    slots = min(factor * demand / config.num_experts, tokens_per_group)  # an expert gets a token at most once
    if config.group_rule == "hugging_face":
        return max(config.min_capacity, math.floor(slots) + math.floor(slots) % 2)
    return max(config.min_capacity, round(slots))
