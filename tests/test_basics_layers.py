"""Does each layer of cs336_basics compute its formula, in every dtype and from every device?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cs336_basics.model import Embedding, Linear, RMSNorm, RotaryEmbedding, SwiGLU
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32, torch.float64)
SEEDS = st.integers(0, 2**32 - 1)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def worst(x: Tensor, truth: Tensor) -> float:
    return (x.double() - truth).abs().max().item()


# --- initialisation ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("layer", "arguments", "std"),
    [(Linear, (300, 500), math.sqrt(2 / 800)), (Embedding, (500, 300), 1.0)],
    ids=["linear", "embedding"],
)
def test_weights_are_a_normal_cut_at_three_deviations(
    layer: type[Any], arguments: tuple[int, int], std: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = layer(*arguments, dtype=dtype).weight
    assert weight.dtype == dtype
    z = weight.detach().double() / std
    # Cutting a normal at 3 leaves a variance of 1 - 6 pdf(3) / P(|z| < 3).
    pdf = math.exp(-4.5) / math.sqrt(2 * math.pi)
    variance = 1 - 6 * pdf / math.erf(3 / math.sqrt(2))
    standard_error = math.sqrt(variance / z.numel())
    assert abs(z.mean().item()) < 5 * standard_error
    assert abs(z.std().item() - math.sqrt(variance)) < 5 * standard_error
    assert 2.8 < z.abs().max().item() <= 3 * (1 + torch.finfo(dtype).eps)


def layers_of_every_kind(**where: Any) -> dict[str, nn.Module]:
    return {
        "linear": Linear(4, 6, **where),
        "embedding": Embedding(5, 4, **where),
        "rms_norm": RMSNorm(4, **where),
        "rope": RotaryEmbedding(8, 4, **where),
        "swiglu": SwiGLU(4, 6, **where),
    }


@pytest.mark.parametrize("name", layers_of_every_kind())
def test_device_and_dtype_reach_every_tensor(name: str) -> None:
    layer = layers_of_every_kind(device="meta", dtype=torch.bfloat16)[name]
    tensors = [*layer.parameters(), *layer.buffers()]
    assert tensors
    assert all(t.is_meta for t in tensors)
    assert all(p.dtype == torch.bfloat16 for p in layer.parameters())
    with torch.device("meta"):
        layer = layers_of_every_kind()[name]
    assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers()])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("linear", "Linear(d_in=4, d_out=6)"),
        ("embedding", "Embedding(vocab_size=5, d_model=4)"),
        ("rms_norm", "RMSNorm(hidden_size=4, eps=1e-05)"),
        ("rope", "RotaryEmbedding(context_length=8, dim=4, theta=10000.0)"),
    ],
)
def test_a_layer_prints_its_sizes(name: str, text: str) -> None:
    assert repr(layers_of_every_kind()[name]) == text


# --- linear, embedding, feed-forward ----------------------------------------------------------


def test_linear_is_the_matrix_product_without_bias() -> None:
    layer = Linear(5, 7, dtype=torch.float64)
    x = normal(2, 3, 5)
    assert_close(layer(x), torch.einsum("bsi,oi->bso", x, layer.weight))
    assert list(layer.state_dict()) == ["weight"]
    assert layer.weight.shape == (7, 5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64], ids=str)
def test_embedding_picks_rows_for_any_integer_type(dtype: torch.dtype) -> None:
    layer = Embedding(6, 4)
    ids = torch.tensor([[0, 5], [3, 3]]).to(dtype)
    assert torch.equal(layer(ids), layer.weight[ids.long()])


def test_embedding_of_no_ids_is_empty() -> None:
    assert Embedding(6, 4)(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([6]), r"Embedding: token ids must be in \[0, 6\), got 6"),
        (torch.tensor([2, -1]), r"Embedding: token ids must be in \[0, 6\), got -1"),
        (torch.tensor([1.0]), "Embedding: token ids must be integers, got torch.float32"),
        (torch.tensor([True]), "Embedding: token ids must be integers, got torch.bool"),
    ],
)
def test_embedding_names_bad_ids(ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Embedding(6, 4)(ids)


def test_swiglu_is_its_formula() -> None:
    layer = SwiGLU(4, 6, dtype=torch.float64)
    x = normal(2, 3, 4)
    gate = x @ layer.w1.weight.T
    expected = (gate * torch.sigmoid(gate) * (x @ layer.w3.weight.T)) @ layer.w2.weight.T
    assert_close(layer(x), expected)
    assert sorted(layer.state_dict()) == ["w1.weight", "w2.weight", "w3.weight"]


# --- RMSNorm ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(lead=st.lists(st.integers(1, 3), max_size=3), hidden=st.integers(1, 9), seed=SEEDS)
def test_rms_norm_and_its_gradients_equal_torch(lead: list[int], hidden: int, seed: int) -> None:
    layer = RMSNorm(hidden, eps=1e-4, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    x = normal(*lead, hidden, seed=seed).requires_grad_()
    ours, theirs = layer(x), F.rms_norm(x, (hidden,), layer.weight, 1e-4)
    assert_close(ours, theirs)
    inputs = (x, layer.weight)
    assert_close(
        torch.autograd.grad(ours.square().sum(), inputs),
        torch.autograd.grad(theirs.square().sum(), inputs),
    )


@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
def test_rms_norm_answers_in_the_dtype_of_x(
    x_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    layer = RMSNorm(64, dtype=weight_dtype)
    x = normal(8, 64, dtype=x_dtype)
    y = layer(x)
    assert y.dtype == x_dtype
    truth = F.rms_norm(x.double(), (64,), eps=layer.eps)
    same_dtype = F.rms_norm(x, (64,), eps=layer.eps)
    assert worst(y, truth) <= 2 * worst(same_dtype, truth)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_rms_norm_keeps_its_dtype_under_autocast(dtype: torch.dtype) -> None:
    x = normal(2, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = RMSNorm(8)(x)
    assert y.dtype == dtype
    assert torch.equal(y, RMSNorm(8)(x))


def test_rms_norm_squares_fp16_without_overflow() -> None:
    x = torch.full((1, 4), 1000.0, dtype=torch.float16)
    assert torch.equal(RMSNorm(4)(x), torch.ones_like(x))


# --- RoPE -------------------------------------------------------------------------------------


def turned(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE as the product with a complex number, in fp64."""
    dim = x.shape[-1]
    angles = positions[..., None].double() * theta ** (-torch.arange(0, dim, 2).double() / dim)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (dim // 2, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


@settings(deadline=None, max_examples=40)
@given(
    lead=st.lists(st.integers(1, 3), max_size=3),
    seq=st.integers(0, 6),
    half_dim=st.integers(1, 4),
    theta=st.sampled_from([100.0, 10000.0, 500000.0]),
    seed=SEEDS,
)
@example(lead=[], seq=1, half_dim=1, theta=10000.0, seed=0)
def test_rope_turns_neighbouring_channels(
    lead: list[int], seq: int, half_dim: int, theta: float, seed: int
) -> None:
    rope = RotaryEmbedding(32, 2 * half_dim, theta)
    x = normal(*lead, seq, 2 * half_dim, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(32, (*lead, seq), generator=generator)
    # The tables are fp32, and a channel is a sum of two products with their entries.
    budget = 2 * torch.finfo(torch.float32).eps * x.abs().sum().item()
    assert_close(rope(x, positions), turned(x, positions, theta), rtol=0, atol=budget)
    assert_close(rope(x), turned(x, torch.arange(seq), theta), rtol=0, atol=budget)
    assert torch.equal(rope(x), rope(x, torch.arange(seq)))


def test_rope_pairs_are_neighbours() -> None:
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    y = RotaryEmbedding(4, 4, theta=100.0)(x, torch.tensor([1, 2]))
    slow = 2 / 10  # position 2 at frequency 100 ** (-2 / 4)
    expected = [[math.cos(1), math.sin(1), 0, 0], [0, 0, math.cos(slow), math.sin(slow)]]
    assert_close(y, torch.tensor(expected))


@settings(deadline=None, max_examples=25)
@given(query=st.integers(0, 40), key=st.integers(0, 40), shift=st.integers(0, 40), seed=SEEDS)
def test_rope_scores_depend_on_the_distance_only(
    query: int, key: int, shift: int, seed: int
) -> None:
    rope = RotaryEmbedding(81, 8)
    q, k = normal(2, 1, 8, seed=seed)

    def score(query_position: int, key_position: int) -> Tensor:
        q_turned = rope(q, torch.tensor([query_position]))
        return (q_turned * rope(k, torch.tensor([key_position]))).sum()

    scale = (q.norm() * k.norm()).item()
    budget = 8 * torch.finfo(torch.float32).eps * scale
    assert abs((score(query, key) - score(query + shift, key + shift)).item()) <= budget


def test_rope_is_exact_at_far_positions() -> None:
    positions = torch.tensor([32767])
    y = RotaryEmbedding(32768, 64)(torch.ones(1, 64), positions)
    # Angles computed in fp32 would be off by 1e-3 here.
    assert worst(y, turned(torch.ones(1, 64), positions, 10000.0)) <= 2e-7


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rope_answers_in_the_dtype_of_x_from_fp32_tables(dtype: torch.dtype) -> None:
    rope = RotaryEmbedding(16, 8).to(dtype)
    assert rope.cos.dtype == rope.sin.dtype == torch.float32
    fresh = RotaryEmbedding(16, 8)
    assert torch.equal(rope.cos, fresh.cos)
    assert torch.equal(rope.sin, fresh.sin)
    x = normal(16, 8, dtype=dtype)
    y = rope(x)
    assert y.dtype == dtype
    truth = turned(x, torch.arange(16), 10000.0)
    half_ulp = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    assert worst(y, truth) <= 2 * half_ulp * truth.abs().max().item()


def test_rope_tables_are_not_saved_and_survive_the_meta_device() -> None:
    rope = RotaryEmbedding(16, 8, device="meta")
    assert rope.state_dict() == {}
    rope.to_empty(device="cpu")
    assert torch.equal(rope.cos, RotaryEmbedding(16, 8).cos)
    assert torch.equal(rope.sin, RotaryEmbedding(16, 8).sin)
    rope.cos.zero_()
    rope.reset_parameters()
    assert torch.equal(rope.cos, RotaryEmbedding(16, 8).cos)


def test_rope_slices_the_table_for_implicit_positions() -> None:
    rope = RotaryEmbedding(16, 8)
    cos, sin = rope._rows_for(5, None)
    assert cos.data_ptr() == rope.cos.data_ptr()
    assert sin.data_ptr() == rope.sin.data_ptr()


@pytest.mark.parametrize(
    ("shape", "pos_ids", "message"),
    [
        ((5, 6), None, "sequence length must be at most the table's 4, got 5"),
        ((1, 6), torch.tensor([4]), r"pos_ids must be in \[0, 4\), got 4"),
        ((1, 6), torch.tensor([-1]), r"pos_ids must be in \[0, 4\), got -1"),
        ((1, 6), torch.tensor([0.5]), "pos_ids must be integers, got torch.float32"),
        ((2, 6), torch.tensor([0]), r"pos_ids must be \(..., 2\), got \(1,\)"),
        ((2, 8), None, r"x must be \(..., seq, 6\), got \(2, 8\)"),
        ((6,), None, r"x must be \(..., seq, 6\), got \(6,\)"),
    ],
)
def test_rope_names_bad_arguments(
    shape: tuple[int, ...], pos_ids: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=f"RotaryEmbedding: {message}"):
        RotaryEmbedding(4, 6)(torch.zeros(shape), pos_ids)


def test_rope_refuses_an_odd_dim() -> None:
    with pytest.raises(ValueError, match="RotaryEmbedding: dim must be even, got 5"):
        RotaryEmbedding(4, 5)
