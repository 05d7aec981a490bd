"""Is attention the textbook's, per head and causal, and can it be replaced from outside?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cs336_basics import model as model_module
from cs336_basics.model import (
    BasicsTransformerLM,
    CausalMultiHeadSelfAttention,
    RotaryEmbedding,
    scaled_dot_product_attention,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

SEEDS = st.integers(0, 2**32 - 1)
TINY = {
    "vocab_size": 11,
    "context_length": 8,
    "d_model": 12,
    "num_layers": 2,
    "num_heads": 3,
    "d_ff": 20,
    "rope_theta": 1000.0,
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def tiny_model(**changes: Any) -> BasicsTransformerLM:
    torch.manual_seed(0)
    return BasicsTransformerLM(**{**TINY, **changes})


def attention_layers(model: nn.Module) -> list[CausalMultiHeadSelfAttention]:
    return [m for m in model.modules() if isinstance(m, CausalMultiHeadSelfAttention)]


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


# --- scaled_dot_product_attention -------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(
    lead=st.lists(st.integers(1, 3), max_size=3),
    sizes=st.tuples(*[st.integers(1, 6)] * 4),
    visible=st.sampled_from([None, 0.0, 0.3, 1.0]),
    seed=SEEDS,
)
@example(lead=[], sizes=(3, 4, 2, 2), visible=0.0, seed=0)
def test_attention_and_its_gradients_equal_torch(
    lead: list[int], sizes: tuple[int, int, int, int], visible: float | None, seed: int
) -> None:
    num_queries, num_keys, d, d_v = sizes
    q = normal(*lead, num_queries, d, seed=seed).requires_grad_()
    k = normal(*lead, num_keys, d, seed=seed + 1).requires_grad_()
    v = normal(*lead, num_keys, d_v, seed=seed + 2).requires_grad_()
    mask, row_sees_a_key = None, torch.ones(num_queries, 1, dtype=torch.bool)
    if visible is not None:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(num_queries, num_keys, generator=generator) < visible
        row_sees_a_key = mask.any(-1, keepdim=True)
    ours = scaled_dot_product_attention(q, k, v, mask)
    # What a row that sees nothing yields is left out of torch's answer, and is zero in ours.
    open_mask = None if mask is None else mask | ~row_sees_a_key
    theirs = F.scaled_dot_product_attention(q, k, v, open_mask) * row_sees_a_key
    assert_close(ours, theirs)
    assert torch.equal(ours * ~row_sees_a_key, torch.zeros_like(ours))
    inputs = (q, k, v)
    assert_close(
        torch.autograd.grad(ours.sin().sum(), inputs),
        torch.autograd.grad(theirs.sin().sum(), inputs),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_attention_is_as_exact_as_torch_in_every_dtype(dtype: torch.dtype) -> None:
    q, k, v = (normal(2, 3, 40, 12, seed=seed, dtype=dtype) for seed in range(3))
    truth = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = F.scaled_dot_product_attention(q, k, v)
    ours = scaled_dot_product_attention(q, k, v)
    assert ours.dtype == dtype
    # Three roundings to dtype (scaled query, scores, weights), where torch's math path has fewer.
    spacing = torch.finfo(dtype).eps * truth.abs().max()
    assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + 2 * spacing


def test_attention_masks_per_batch_and_head() -> None:
    q, k, v = (normal(2, 3, 4, 5, seed=seed) for seed in range(3))
    mask = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.7
    mask[..., 0] = True
    assert_close(
        scaled_dot_product_attention(Q=q, K=k, V=v, mask=mask),
        F.scaled_dot_product_attention(q, k, v, mask),
    )


# --- multi-head self-attention ----------------------------------------------------------------


def expected_attention(
    layer: CausalMultiHeadSelfAttention, x: Tensor, positions: Tensor | None = None
) -> Tensor:
    """One head at a time, on torch's attention."""
    outputs = []
    for head in range(layer.num_heads):
        rows = slice(head * layer.d_head, (head + 1) * layer.d_head)
        q, k, v = (
            x @ p.weight[rows].T for p in (layer.q_proj, layer.k_proj, layer.v_proj)
        )  # (batch, seq, d_head)
        if layer.positional_encoder is not None:
            q, k = layer.positional_encoder(q, positions), layer.positional_encoder(k, positions)
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True))
    return torch.cat(outputs, dim=-1) @ layer.output_proj.weight.T


@pytest.mark.parametrize("use_rope", [False, True])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_self_attention_is_causal_attention_per_head(num_heads: int, use_rope: bool) -> None:
    rope = RotaryEmbedding(16, 12 // num_heads) if use_rope else None
    layer = CausalMultiHeadSelfAttention(12, num_heads, rope, dtype=torch.float64)
    x = normal(2, 5, 12)
    assert_close(layer(x), expected_attention(layer, x))
    assert sorted(layer.state_dict()) == [
        f"{name}_proj.weight" for name in ("k", "output", "q", "v")
    ]


def test_self_attention_takes_positions() -> None:
    layer = CausalMultiHeadSelfAttention(12, 3, RotaryEmbedding(16, 4), dtype=torch.float64)
    x = normal(3, 5, 12)  # as many rows as heads: positions must not be taken for heads'
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11], [15, 0, 3, 3, 9]])
    assert_close(layer(x, positions), expected_attention(layer, x, positions))
    # Scores depend on distances only, up to the rounding of the fp32 tables.
    shifted = layer(x, torch.arange(6, 11))
    assert_close(shifted, layer(x), atol=1e-6, rtol=0)
    assert torch.equal(layer(x, torch.arange(5)), layer(x))


def torch_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    assert q.dtype == k.dtype == v.dtype
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("hooked", [False, True])
def test_self_attention_takes_any_leading_dims(lead: tuple[int, ...], hooked: bool) -> None:
    layer = CausalMultiHeadSelfAttention(12, 3, RotaryEmbedding(16, 4), dtype=torch.float64)
    layer.attention_fn = torch_attention if hooked else None
    x = normal(*lead, 5, 12)
    expected = expected_attention(layer, x.reshape(-1, 5, 12)).reshape(x.shape)
    assert_close(layer(x), expected)


@pytest.mark.parametrize("num_heads", [0, 5, 13])
def test_heads_must_divide_the_model(num_heads: int) -> None:
    message = f"num_heads must divide d_model 12, got {num_heads}"
    with pytest.raises(ValueError, match=message):
        CausalMultiHeadSelfAttention(12, num_heads)
    with pytest.raises(ValueError, match=message):
        tiny_model(num_heads=num_heads)


def test_heads_that_are_turned_must_have_an_even_dim() -> None:
    with pytest.raises(ValueError, match="RotaryEmbedding: dim must be even, got 3"):
        tiny_model(d_model=9)
    assert CausalMultiHeadSelfAttention(9, 3)(torch.zeros(1, 2, 9)).shape == (1, 2, 9)


# --- replacing attention ----------------------------------------------------------------------


def test_a_patched_attention_is_picked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    expected = model(tokens(2, 5))
    calls: list[dict[str, Tensor]] = []

    def annotated(**operands: Tensor) -> Tensor:
        calls.append(operands)
        return scaled_dot_product_attention(**operands)

    monkeypatch.setattr(model_module, "scaled_dot_product_attention", annotated)
    assert torch.equal(model(tokens(2, 5)), expected)
    assert len(calls) == TINY["num_layers"]
    assert all(set(call) == {"Q", "K", "V", "mask"} for call in calls)
    assert torch.equal(calls[0]["mask"], torch.ones(5, 5, dtype=torch.bool).tril())


def test_the_attention_hook_replaces_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(dtype=torch.float64)
    expected = model(tokens(2, 5))
    monkeypatch.delattr(model_module, "scaled_dot_product_attention")
    calls: list[tuple[torch.Size, bool]] = []

    def hook(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
        assert q.shape == k.shape == v.shape
        calls.append((q.shape, is_causal))
        return torch_attention(q, k, v, is_causal)

    for layer in attention_layers(model):
        assert layer.attention_fn is None
        layer.attention_fn = hook
    assert_close(model(tokens(2, 5)), expected)
    assert calls == [((2, 3, 5, 4), True)] * 2


def test_the_attention_hook_may_be_a_module() -> None:
    class Kernel(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
            return torch_attention(q, k, v, is_causal)

    layer = CausalMultiHeadSelfAttention(12, 3, dtype=torch.float64)
    expected = layer(normal(2, 5, 12))
    layer.attention_fn = Kernel()
    assert_close(layer(normal(2, 5, 12)), expected)


def test_the_attention_hook_sees_one_dtype_under_autocast() -> None:
    seen: list[torch.dtype] = []

    def hook(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        seen.append(q.dtype)
        return torch_attention(q, k, v, is_causal)

    model = tiny_model()
    for layer in attention_layers(model):
        layer.attention_fn = hook
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens(2, 5))
    assert seen == [torch.bfloat16] * 2
