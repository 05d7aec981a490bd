"""Every row of the attention table against fp64, forward and backward, on whatever device is
here."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from numerics import assert_within_budget, term_magnitudes
from torch import Tensor

from cs336_systems.attention import ATTENTION, attention, check_arguments
from cs336_systems.attention.masks import causal_mask
from cs336_systems.attention.plain import scaled_dot_prod_attention
from cs336_systems.attention.reference import reference_attention, reference_gradients
from cs336_systems.errors import UsageError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(seed: int, shape: tuple[int, ...], num_keys: int, dtype: torch.dtype) -> list[Tensor]:
    """Return q, k, v and the output's gradient."""
    generator = torch.Generator().manual_seed(seed)
    keys = (*shape[:-2], num_keys, shape[-1])
    return [
        torch.randn(size, generator=generator).to(DEVICE, dtype)
        for size in (shape, keys, keys, shape)
    ]


def run(kind: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor, is_causal: bool) -> list[Tensor]:
    """Return output and the three gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v)]
    o = attention(*leaves, is_causal=is_causal, kind=kind)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("is_causal", [False, True])
def test_row_is_right(kind: str, dtype: str, is_causal: bool) -> None:
    """Each row on a shape that is no power of two."""
    unmet = ATTENTION[kind].unmet(device=DEVICE, dtype=dtype)
    if unmet is not None:
        pytest.skip(f"{kind}: {unmet.reason}")
    head_dim = min(ATTENTION[kind].head_dims, default=32)
    q, k, v, do = inputs(0, (2, 3, 70, head_dim), 70, DTYPES[dtype])
    exact = reference_gradients(q, k, v, do, is_causal=is_causal)
    truth = [exact.o, exact.dq, exact.dk, exact.dv]
    plain = run("scaled_dot_prod_attention", q, k, v, do, is_causal)
    got = run(kind, q, k, v, do, is_causal)
    assert_within_budget(got, plain, truth, term_magnitudes(q, k, v, do))


@given(
    seed=st.integers(0, 2**16),
    leading=st.sampled_from([(), (2,), (2, 3), (2, 1, 2)]),
    num_queries=st.integers(1, 40),
    extra_keys=st.integers(-5, 20),
    head_dim=st.sampled_from([1, 8, 24]),
    is_causal=st.booleans(),
    kind=st.sampled_from(["scaled_dot_prod_attention", "vectorized_torch", "sdpa"]),
)
@example(0, (2, 3), 1, 0, 8, True, "vectorized_torch")
@example(0, (), 40, -5, 8, True, "sdpa")  # More queries than keys.
def test_any_shape(
    seed: int,
    leading: tuple[int, ...],
    num_queries: int,
    extra_keys: int,
    head_dim: int,
    is_causal: bool,
    kind: str,
) -> None:
    """Leading dimensions, unequal lengths, lengths of one."""
    num_keys = max(1, num_queries + extra_keys)
    q, k, v, do = inputs(seed, (*leading, num_queries, head_dim), num_keys, torch.float32)
    exact = reference_gradients(q, k, v, do, is_causal=is_causal)
    plain = run("scaled_dot_prod_attention", q, k, v, do, is_causal)
    truth = [exact.o, exact.dq, exact.dk, exact.dv]
    got = run(kind, q, k, v, do, is_causal)
    # SDPA's backward pass computes each weight from its score and L.
    magnitudes = term_magnitudes(q, k, v, do, rounded_scores=True)
    assert_within_budget(got, plain, truth, magnitudes)


@pytest.mark.parametrize("kind", ["scaled_dot_prod_attention", "vectorized_torch", "sdpa"])
def test_scale_and_large_logits(kind: str) -> None:
    q, k, v, _ = inputs(1, (1, 2, 33, 16), 33, torch.float32)
    for scale in (0.3, 1e4):
        exact, _ = reference_attention(q, k, v, scale=scale)
        got = attention(q, k, v, scale=scale, kind=kind)
        assert torch.isfinite(got).all()
        if scale == 0.3:
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_compiled_plain_backward_is_finite_in_bf16() -> None:
    """Autograd through the row maximum once gave NaN: no recomputed score equalled the maximum."""
    kind = "scaled_dot_prod_attention_compiled"
    unmet = ATTENTION[kind].unmet(device=DEVICE)
    if unmet is not None:
        pytest.skip(f"{kind}: {unmet.reason}")
    q, k, v, do = inputs(2, (2, 2, 64, 32), 64, torch.bfloat16)
    assert all(torch.isfinite(part).all() for part in run(kind, q, k, v, do, True))


class TestReference:
    """The truth itself, against torch in fp64 and against the definition of L."""

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_output_is_torchs(self, is_causal: bool) -> None:
        q, k, v = (torch.randn(2, 3, 20, 8, dtype=torch.float64) for _ in range(3))
        o, _ = reference_attention(q, k, v, is_causal=is_causal)
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        torch.testing.assert_close(o, theirs, rtol=1e-12, atol=1e-12)

    def test_log_sum_exp_of_two_keys(self) -> None:
        q = torch.tensor([[2.0]])
        k = torch.tensor([[1.0], [3.0]])
        o, lse = reference_attention(q, k, torch.tensor([[0.0], [1.0]]), scale=0.5)
        assert lse.item() == pytest.approx(math.log(math.exp(1.0) + math.exp(3.0)), rel=1e-12)
        assert o.item() == pytest.approx(1 / (1 + math.exp(-2.0)), rel=1e-12)

    def test_row_that_sees_nothing(self) -> None:
        q, k, v = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
        o, lse = reference_attention(q, k[:0], v[:0])
        assert torch.equal(o, torch.zeros_like(o))
        assert torch.equal(lse, torch.full_like(lse, float("-inf")))

    def test_gradients_are_the_derivatives(self) -> None:
        q, k, v = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
        assert torch.autograd.gradcheck(
            lambda *qkv: reference_attention(*qkv, is_causal=True)[0], (q, k, v)
        )


def test_causal_mask_is_aligned_at_the_top_left() -> None:
    assert causal_mask(2, 4, torch.device("cpu")).tolist() == [
        [True, False, False, False],
        [True, True, False, False],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q, k[..., :3], v), "attention: key must have head dim 4, got 3"),
        (lambda q, k, v: (q, k, v[:, :3]), "attention: value must have 6 keys, got 3"),
        (
            lambda q, k, v: (q, k[:1], v),
            "attention: key must have leading dimensions (2,), got (1, 6, 4)",
        ),
        (
            lambda q, k, v: (q.new_zeros(3, 4, 5, 4), k[:, None], v[:, None]),
            "attention: key must have leading dimensions (3,), got (2, 1, 6, 4)",
        ),
        (
            lambda q, k, v: (q.repeat(2, 2, 1)[None], k.repeat(2, 1, 1)[None, :3], v[None]),
            "attention: key must have a number of heads that divides the query's 4, got 3",
        ),
        (
            lambda q, k, v: (q.repeat(2, 1, 1)[None], k[None], v.repeat(2, 1, 1)[None]),
            "attention: value must have 2 heads as key has, got 4",
        ),
        (
            lambda q, k, v: (q.long(), k.long(), v.long()),
            "attention: query must have a floating-point dtype, got torch.int64",
        ),
        (lambda q, k, v: (q, k.double(), v), "attention: key must have dtype torch.float32, got"),
        (lambda q, k, v: (q, k, v.to("meta")), "attention: value must be on cpu, got 'meta'"),
        (lambda q, k, v: (q[0, 0], k, v), "attention: query must have at least 2 dimensions"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message: str) -> None:  # type: ignore[no-untyped-def]
    q, k, v = torch.randn(2, 5, 4), torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    with pytest.raises(UsageError) as caught:
        check_arguments(*change(q, k, v))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_unknown_row_is_named() -> None:
    x = torch.randn(2, 5, 4)
    with pytest.raises(
        UsageError, match="attention: row must be one of scaled_dot_prod_attention, "
    ):
        attention(x, x, x, kind="flash_attention_9")


def test_vectorized_keeps_less_for_backward() -> None:
    from cs336_systems.measure.memory import saved_bytes

    q, k, v = (torch.randn(2, 64, 8, requires_grad=True) for _ in range(3))
    kept = {
        kind: saved_bytes(lambda kind=kind: attention(q, k, v, is_causal=True, kind=kind))
        for kind in ("scaled_dot_prod_attention", "vectorized_torch")
    }
    score_bytes = 2 * 64 * 64 * 4
    assert kept["vectorized_torch"] < 2 * score_bytes < kept["scaled_dot_prod_attention"]
    assert scaled_dot_prod_attention(q, k, v).shape == q.shape
