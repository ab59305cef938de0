"""The choices of the paper, and what must not depend on neighbours, padding or micro-batches."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder

from .conftest import build, rows


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def reference_block(block, x, top_k: int, capacity: int):
    """Paper Eq. 4 token by token: x += Attn(norm1 x); h = norm2 x; x += MoE(h) + FFN(h). One group a row."""

    def norm(layer, v):
        return v / torch.sqrt(v.pow(2).mean(-1, keepdim=True) + layer.eps) * layer.scale

    def rotated(v):
        half = v.shape[-1] // 2
        freq = 10000.0 ** (-torch.arange(half, dtype=v.dtype) / half)
        turn = torch.polar(
            torch.ones((), dtype=v.dtype), torch.arange(v.shape[-2], dtype=v.dtype)[:, None] * freq
        )
        z = torch.complex(v[..., :half], v[..., half:]) * turn
        return torch.cat((z.real, z.imag), -1)

    a, n = block.attention, norm(block.attention_norm, x)
    q, k, v = ((n @ m.weight.t()).unflatten(-1, (-1, a.head_dim)).transpose(1, 2) for m in (a.q, a.k, a.v))
    scores = rotated(q) @ rotated(k).transpose(-1, -2)
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ a.o.weight.t()
    h = norm(block.moe_norm, x)
    e, f = block.moe.experts, block.ffn
    y = (F.silu(h @ f.wi_0.t()) * (h @ f.wi_1.t())) @ f.wo.t()
    for row in range(x.shape[0]):
        probs = (h[row] @ block.moe.router.weight.t()).softmax(-1)
        used = [0] * probs.shape[-1]
        order = probs.argsort(dim=-1, descending=True, stable=True)
        for choice in range(top_k):
            for token in range(x.shape[1]):
                expert = int(order[token, choice])
                used[expert] += 1
                if used[expert] <= capacity:
                    t = h[row, token]
                    out = (F.silu(t @ e.wi_0[expert].t()) * (t @ e.wi_1[expert].t())) @ e.wo[expert].t()
                    y[row, token] = y[row, token] + probs[token, expert] * out
    return x + y


@pytest.mark.parametrize("dispatch", ["sort", "einsum"])
def test_paper_block(config, dispatch):
    """The paper's block has no golden file: parallel experts and FFN on one norm, three matrices, groups of a
    row."""
    model = build(config.model_copy(update={"dispatch": dispatch, "capacity_factor_train": 1.0}))
    x = torch.randn(3, 24, 32, dtype=torch.float64)
    out, statistics, _ = model.layers[1](x, model._positions(rows([24, 24, 24]), x))
    close(out, reference_block(model.layers[1], x, top_k=2, capacity=6))
    assert 0 < statistics.kept.sum() < statistics.assigned.sum()


def test_layers_interleave(config):
    """Experts in the wrong layers (facts 1.1: every moe_every-th, counted from one)."""
    assert [block.moe is not None for block in build(config).layers] == [False, True, False, True]
    dense = build(config.model_copy(update={"moe_every": 0}))
    assert all(block.moe is None for block in dense.layers)
    assert dense(rows([24])).router == []


@pytest.mark.parametrize(
    "options", [{}, {"dropless": True}, {"capacity_includes_k": True}, {"tied_head": True}]
)
def test_dispatchers_agree(config, options):
    """The sort path against the one-hot oracle, values and gradients, under every capacity rule."""
    batch = rows([24, 20, 7, 1])
    results = []
    for dispatch in ("sort", "einsum"):
        model = build(config.model_copy(update={**options, "dispatch": dispatch}))
        out = model(batch)
        loss = model.logits(out.hidden).square().mean() + sum(s.load_balancing_sum for s in out.router)
        loss.backward()
        results.append((out.hidden, {n: p.grad for n, p in model.named_parameters()}, out.router))
    close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        close(gradient, results[1][1][name])
    if options.get("dropless"):
        for s in results[0][2]:
            close(s.kept, s.assigned)


def test_padding_changes_nothing(config):
    """Padding that is not routed must take no slot, enter no router loss and reach no real token."""
    model = build(config)
    short, long = rows([9], seq_len=12), rows([9], seq_len=12)
    # Other content at the padding positions of the input: a leak shows as a difference.
    long = replace(long, input_tokens=long.input_tokens.masked_fill(long.target_tokens == 0, 7))
    a, b = model(short), model(long)
    close(a.hidden[:, :9], b.hidden[:, :9])
    for one, other in zip(a.router, b.router, strict=True):
        close(one.load_balancing_sum, other.load_balancing_sum)
        close(one.router_z_sum, other.router_z_sum)
        assert one.routed_tokens == other.routed_tokens == 9


def test_all_padding(config):
    """A micro-batch with nothing but padding: no slot is taken; no NaN may come out of the divisions."""
    model = build(config)
    out = model(rows([0, 0]))
    (out.hidden.sum() + sum(s.load_balancing_sum + s.router_z_sum for s in out.router)).backward()
    assert out.hidden.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("group_rows", [1, 2])
def test_micro_batches_add_up(config, group_rows):
    """Routing that reaches across groups: any split into whole groups must give the same rows and the same
    sums."""
    model = build(config.model_copy(update={"group_rows": group_rows}))
    batch = rows([24, 13, 20, 5])
    whole = model(batch)
    parts = [
        model(
            replace(
                batch,
                **{
                    n: getattr(batch, n)[i : i + 2] for n in ("input_tokens", "target_tokens", "loss_weights")
                },
            )
        )
        for i in (0, 2)
    ]
    close(whole.hidden, torch.cat([p.hidden for p in parts]))
    for layer, statistics in enumerate(whole.router):
        for name in ("load_balancing_sum", "router_z_sum", "assigned", "kept", "num_groups"):
            ours = torch.as_tensor(getattr(statistics, name), dtype=torch.float64)
            close(
                ours, sum(torch.as_tensor(getattr(p.router[layer], name), dtype=torch.float64) for p in parts)
            )


def test_rows_must_make_whole_groups(config):
    """A group cut by the micro-batch's end would silently change capacity and losses."""
    model = build(config.model_copy(update={"group_rows": 2}))
    with pytest.raises(ValueError, match=r"model.group_rows=2.*3 rows"):
        model(rows([24, 24, 24]))


def test_segments_and_prefix(config):
    """Attention across packed examples, or a prefix that stays causal."""
    model = build(config.model_copy(update={"attention": "prefix", "moe_every": 0}))
    batch = rows([24])
    segments = torch.tensor([[1] * 10 + [2] * 14])
    prefix = torch.zeros(1, 24, dtype=torch.bool)
    prefix[0, 10:15] = True

    def hidden(tokens):
        return model(replace(batch, input_tokens=tokens, segment_ids=segments, prefix_mask=prefix)).hidden

    changed = {}
    for position in (3, 14, 20):
        tokens = batch.input_tokens.clone()
        tokens[0, position] += 1
        different = (hidden(tokens) - hidden(batch.input_tokens)).abs().amax(-1)[0] > 1e-12
        changed[position] = different.nonzero().flatten().tolist()
    assert changed[3] == list(range(3, 10))  # causal, inside its own example
    assert changed[14] == list(range(10, 24))  # seen by the whole prefix before it
    assert changed[20] == list(range(20, 24))


def test_frozen_router(config):
    """A frozen router must get no gradient while tokens keep flowing through it."""
    model = build(config)
    model.freeze_routers()
    model(rows([24])).hidden.sum().backward()
    for block in model.layers:
        if block.moe is not None:
            assert block.moe.router.weight.grad is None
            assert block.moe.experts.wi_0.grad.abs().sum() > 0


def test_routing_trace(config):
    """A trace in the wrong shape or order would assign choices to the wrong tokens."""
    model = build(config.model_copy(update={"group_rows": 2, "capacity_factor_train": 0.5}))
    batch = rows([24, 18, 24, 3])
    out = model(batch, trace=True)
    assert [t.layer for t in out.traces] == [1, 3]
    for trace, statistics in zip(out.traces, out.router, strict=True):
        real = batch.target_tokens > 0
        assert trace.expert_index.shape == trace.probs.shape == trace.kept.shape == (4, 24, 2)
        assert not trace.kept[~real].any()
        assert trace.kept.sum() == statistics.kept.sum()
        assert torch.equal(trace.token_ids, batch.input_tokens)
        assert trace.positions[2].tolist() == list(range(24))
        probs = trace.logits.softmax(-1).gather(-1, trace.expert_index)
        close(probs, trace.probs)


def test_eval_capacity_is_larger(config):
    """Evaluating at the training capacity drops tokens the paper's evaluation keeps."""
    model = build(config)
    kept = []
    for mode in (True, False):
        kept.append(sum(s.kept.sum() for s in model.train(mode)(rows([24] * 4)).router))
    assert kept[1] > kept[0]


def test_compute_dtype(config):
    """bfloat16 must reach the matrices and stop before the router."""
    model = Decoder(config, compute_dtype=torch.bfloat16)
    model.load_state_dict(build(config, torch.float32).state_dict())
    out = model(rows([24]), trace=True)
    assert out.hidden.dtype == torch.bfloat16
    assert out.traces[0].logits.dtype == torch.float32


def test_the_ports_groups_with_the_ports_capacity(config: ModelConfig) -> None:
    """Bug: half the room of the released PyTorch code under its name."""
    values = config.model_dump() | {"group_rule": "hugging_face"}
    with pytest.raises(
        ValueError, match="capacity_includes_k=false: allowed true with group_rule=hugging_face"
    ):
        ModelConfig(**values)
    ModelConfig(**(values | {"capacity_includes_k": True}))
