"""FlashAttention-2 in plain PyTorch: against fp64, both passes; what it keeps and makes."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import adapters
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numerics import assert_within_budget, term_magnitudes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cs336_systems.attention import attention
from cs336_systems.attention.arguments import repeat_heads, scale_or_default
from cs336_systems.attention.flash_torch import (
    TILES,
    FlashAttentionTorch,
    Tiles,
    accumulation_dtype,
    flash_attention_torch,
    flash_backward,
    flash_forward,
    tile_gradients,
)
from cs336_systems.attention.flash_torch_compiled import FlashAttentionTorchCompiled
from cs336_systems.attention.masks import causal_mask
from cs336_systems.attention.plain import scaled_dot_prod_attention
from cs336_systems.attention.reference import reference_gradients
from cs336_systems.errors import UsageError
from cs336_systems.measure.memory import saved_bytes
from cs336_systems.table import has_compiler

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("o", "lse", "dq", "dk", "dv")
SMALL = Tiles(8, 4)
# Raised by torch's compiler itself as it traces an autograd function.
traces_a_function = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)
needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
FUNCTIONS = [FlashAttentionTorch, pytest.param(FlashAttentionTorchCompiled, marks=needs_compiler)]


class Case(NamedTuple):
    """What varies between calls."""

    is_causal: bool = False
    scale: float | None = None
    tiles: Tiles = SMALL


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def inputs(
    seed: int,
    leading: tuple[int, ...],
    lengths: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    group: int = 1,
) -> list[Tensor]:
    """Return q, k, v and the output's gradient; q has `group` times the heads of k and v."""
    num_queries, num_keys = lengths
    heads = (*leading[:-1], group * leading[-1]) if group > 1 else leading
    shapes = [(*heads, num_queries), (*leading, num_keys), (*leading, num_keys)]
    shapes.append(shapes[0])
    return [randn(seed + i, *shape, head_dim, dtype=dtype) for i, shape in enumerate(shapes)]


def run(qkv: list[Tensor], do: Tensor, case: Case, function: Any = FlashAttentionTorch) -> Any:
    """Return O, L and the three gradients; L is the last of what is saved."""
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    o = function.apply(*leaves, case.is_causal, case.scale, case.tiles)
    lse = o.grad_fn.saved_tensors[-1]
    return [o.detach(), lse, *torch.autograd.grad(o, leaves, do)]


def run_plain(qkv: list[Tensor], do: Tensor, case: Case) -> list[Tensor]:
    """Return the same of the textbook formula; its L is in the accumulation dtype as well."""
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    o = scaled_dot_prod_attention(*leaves, is_causal=case.is_causal, scale=case.scale)
    q, k, _ = (tensor.to(accumulation_dtype(tensor.dtype)) for tensor in qkv)
    scores = q @ repeat_heads(q, k, k)[0].mT * scale_or_default(case.scale, q.shape[-1])
    if case.is_causal:
        seen = causal_mask(q.shape[-2], k.shape[-2], q.device)
        scores = scores.masked_fill(~seen, float("-inf"))
    gradients = torch.autograd.grad(o, leaves, do)
    return [o.detach(), torch.logsumexp(scores, dim=-1), *gradients]


def assert_right(
    qkv: list[Tensor], do: Tensor, case: Case, function: Any = FlashAttentionTorch
) -> list[Tensor]:
    """Hold O, L and the gradients to the plain formula's errors against fp64."""
    flags = {"is_causal": case.is_causal, "scale": case.scale}
    truth = reference_gradients(*qkv, do, **flags)
    plain = run_plain(qkv, do, case)
    got = run(qkv, do, case, function)
    magnitudes = term_magnitudes(*qkv, do, **flags, rounded_scores=True, names=NAMES)
    assert_within_budget(got, plain, truth, magnitudes, names=NAMES)
    return got


def edges(tile: int) -> st.SearchStrategy[int]:
    """Lengths at which tiles begin, end and are cut."""
    return st.sampled_from([1, tile - 1, tile, tile + 1, 2 * tile, 3 * tile + 2])


@given(
    seed=st.integers(0, 2**16),
    leading=st.sampled_from([(), (2,), (2, 3), (2, 1, 2)]),
    group=st.sampled_from([1, 2, 3]),
    lengths=st.tuples(edges(8), edges(8)),
    head_dim=st.sampled_from([1, 8, 24]),
    dtype=st.sampled_from(DTYPES),
    is_causal=st.booleans(),
    scale=st.sampled_from([None, 0.3, -1.0]),
    tiles=st.sampled_from([Tiles(8, 8), Tiles(8, 4), Tiles(4, 8), Tiles(5, 3), Tiles(1, 1)]),
)
@example(0, (2, 3), 1, (26, 9), 8, torch.float32, True, None, Tiles(8, 4))  # More queries.
@example(0, (2, 3), 2, (9, 26), 8, torch.float32, True, None, Tiles(4, 8))  # More keys.
@example(0, (), 1, (1, 1), 1, torch.bfloat16, True, None, Tiles(8, 8))
def test_any_shape(
    seed: int,
    leading: tuple[int, ...],
    group: int,
    lengths: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    is_causal: bool,
    scale: float | None,
    tiles: Tiles,
) -> None:
    """Lengths around the tiles' edges, equal or not, heads grouped or not."""
    group = group if len(leading) > 1 else 1
    *qkv, do = inputs(seed, leading, lengths, head_dim, dtype, group)
    assert_right(qkv, do, Case(is_causal, scale, tiles))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_own_tiles(dtype: torch.dtype, is_causal: bool) -> None:
    """One position more than a tile in both directions, at the sizes that users get."""
    *qkv, do = inputs(1, (1, 2), (TILES.queries + 1, TILES.keys + 1), 16, dtype)
    assert_right(qkv, do, Case(is_causal, tiles=TILES))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(5, 5), (4, 9), (9, 4), (7, 6)])
@pytest.mark.parametrize("group", [1, 2])
def test_gradients_are_the_derivatives(
    group: int, lengths: tuple[int, int], is_causal: bool
) -> None:
    *qkv, _ = inputs(2, (1, 1), lengths, 2, torch.float64, group)
    leaves = [tensor.requires_grad_() for tensor in qkv]
    for tiles in (Tiles(4, 3), Tiles(2, 5)):
        assert torch.autograd.gradcheck(
            lambda *x, tiles=tiles: FlashAttentionTorch.apply(*x, is_causal, 0.7, tiles), leaves
        )


def test_fp64_is_accumulated_in_fp64() -> None:
    *qkv, do = inputs(3, (2,), (19, 19), 8, torch.float64)
    got = run(qkv, do, Case(is_causal=True))
    for mine, exact in zip(got, reference_gradients(*qkv, do, is_causal=True), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_fp32(dtype: torch.dtype) -> None:
    """Only the results, and O where it comes back in D, are rounded to half."""
    *qkv, do = inputs(4, (2, 4), (40, 40), 16, dtype)
    case = Case(is_causal=True)
    plain = run_plain([tensor.float() for tensor in qkv], do.float(), case)
    plain = [
        part if name == "lse" else part.to(dtype) for name, part in zip(NAMES, plain, strict=True)
    ]
    truth = reference_gradients(*qkv, do, is_causal=True)
    magnitudes = term_magnitudes(*qkv, do, is_causal=True, names=NAMES)
    assert_within_budget(run(qkv, do, case), plain, truth, magnitudes, names=NAMES)


def test_tiles_are_summed_in_fp32() -> None:
    """1024 tiles each add 4 to the sum behind O and 1/1024 to dq: bf16 would stop at a quarter."""
    sign = torch.tensor([1.0, -1.0], device=DEVICE, dtype=torch.bfloat16).repeat(2048)[:, None]
    q, do = torch.zeros_like(sign[:1]), torch.ones_like(sign[:1])
    o, _, dq, *_ = run([q, sign, 1 + sign], do, Case(scale=1.0))
    assert o.item() == 1.0
    assert dq.item() == 1.0


class TestStrides:
    """Inputs that are views of something else."""

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_transposed(self, is_causal: bool) -> None:
        """(batch, seq, heads, head_dim) seen as (batch, heads, seq, head_dim)."""
        *qkv, do = (randn(i, 2, 13, 3, 8).transpose(1, 2) for i in range(4))
        assert_right(qkv, do, Case(is_causal))

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_slices_of_one_projection(self, is_causal: bool) -> None:
        qkv = randn(0, 2, 13, 8, 6).transpose(1, 2).split([4, 2, 2], dim=1)
        assert_right(list(qkv), randn(1, 2, 4, 13, 6), Case(is_causal))

    def test_expanded(self) -> None:
        """Keys of one head lent to three, and a gradient of the same number everywhere."""
        q = randn(0, 2, 3, 13, 8)
        k, v = (randn(i, 2, 1, 9, 8).expand(2, 3, 9, 8) for i in (1, 2))
        assert_right([q, k, v], torch.ones((), device=DEVICE).expand_as(q), Case())

    def test_transposed_matrix(self) -> None:
        *qkv, do = (randn(i, 8, 13).mT for i in range(4))
        assert_right(qkv, do, Case(is_causal=True))


class TestLogits:
    """Scores far from 0, which exp without the running maximum cannot take."""

    @given(
        seed=st.integers(0, 2**16),
        largest=st.sampled_from([30.0, 1e3, 1e4]),
        dtype=st.sampled_from(DTYPES),
        is_causal=st.booleans(),
    )
    def test_scale(self, seed: int, largest: float, dtype: torch.dtype, is_causal: bool) -> None:
        """A scale that takes the largest score to 1e4, of either sign."""
        *qkv, do = inputs(seed, (2,), (17, 17), 8, dtype)
        scale = largest / (qkv[0].double() @ qkv[1].double().mT).abs().max().item()
        assert_right(qkv, do, Case(is_causal, scale))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("offset", [-1e4, 1e4])
    def test_offset(self, offset: float, dtype: torch.dtype) -> None:
        """All scores of a row near -1e4 or 1e4: the offset cancels."""
        q, k, v, do = inputs(5, (2,), (17, 17), 8, dtype)
        q[..., 0], k[..., 0] = 1.0, offset
        o, lse, *_ = assert_right([q, k, v], do, Case(is_causal=True, scale=1.0))
        assert torch.isfinite(o).all()
        assert (lse - offset).abs().max() < 100

    @pytest.mark.parametrize("is_causal", [False, True])
    def test_constant_rows(self, is_causal: bool) -> None:
        """Equal scores give the mean of the values seen, and L the score plus log their number."""
        q, k, v, _ = inputs(6, (2,), (13, 13), 4)
        q[...], k[...] = 1.0, 50.0
        o, lse, *_ = run([q, k, v], torch.ones_like(q), Case(is_causal, scale=1.0))
        count = torch.arange(1, 14) if is_causal else torch.full((13,), 13)
        count = count.to(q)[:, None]
        mean = v.cumsum(-2) / count if is_causal else v.mean(-2, keepdim=True).expand_as(v)
        torch.testing.assert_close(o, mean)
        torch.testing.assert_close(lse, 200 + count.log().mT.expand(2, 13))

    def test_row_of_minus_infinity(self) -> None:
        """Scores that overflow to -inf: a row with nothing else is one that sees nothing."""
        q, k, v = torch.full((1, 3), -1e30), torch.full((9, 3), 1e30), torch.ones(9, 3)
        o, lse, *gradients = run([q, k, v], torch.ones_like(q), Case())
        assert o.tolist() == [[0.0] * 3]
        assert lse.tolist() == [-math.inf]
        assert not any(gradient.any() for gradient in gradients)

    def test_first_tile_of_minus_infinity(self) -> None:
        """A finite score after a tile without one: its rescale factor is 0, not NaN."""
        q, k, v = torch.full((1, 3), -1e30), torch.full((9, 3), 1e30), torch.ones(9, 3)
        k[-1] = 0.0
        v[-1] = 5.0
        o, lse, *_ = run([q, k, v], torch.ones_like(q), Case())
        assert o.tolist() == [[5.0] * 3]
        assert lse.tolist() == [0.0]


@pytest.mark.parametrize("is_causal", [False, True])
class TestNothing:
    """Lengths and batches of zero."""

    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_zero_keys(self, function: Any, is_causal: bool) -> None:
        *qkv, do = inputs(7, (2, 3), (9, 0), 4)
        o, lse, *gradients = run(qkv, do, Case(is_causal), function)
        assert torch.equal(o, torch.zeros_like(qkv[0]))
        assert torch.equal(lse, torch.full_like(o[..., 0], -math.inf))
        assert torch.equal(gradients[0], torch.zeros_like(o))
        assert gradients[1].shape == gradients[2].shape == (2, 3, 0, 4)

    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_zero_queries(self, function: Any, is_causal: bool) -> None:
        *qkv, do = inputs(7, (2, 3), (0, 9), 4)
        o, lse, dq, dk, dv = run(qkv, do, Case(is_causal), function)
        assert o.shape == dq.shape == (2, 3, 0, 4)
        assert lse.shape == (2, 3, 0)
        assert torch.equal(dk, torch.zeros_like(qkv[1]))
        assert torch.equal(dv, torch.zeros_like(qkv[2]))

    @pytest.mark.parametrize("leading", [(0,), (0, 3), (2, 0)])
    def test_empty_batch(self, is_causal: bool, leading: tuple[int, ...]) -> None:
        *qkv, do = inputs(7, leading, (9, 5), 4)
        parts = run(qkv, do, Case(is_causal))
        expected = [qkv[0].shape, qkv[0].shape[:-1], *(x.shape for x in qkv)]
        assert [part.shape for part in parts] == expected


def test_tiles_past_the_diagonal_are_not_visited() -> None:
    """NaN in keys that no query of a tile may see reaches neither outputs nor gradients."""
    q, k, v, do = inputs(8, (2,), (16, 32), 4)
    k[:, 16:], v[:, 16:] = float("nan"), float("nan")
    tiles = Tiles(8, 4)
    flags = {"is_causal": True, "scale": 0.5, "tiles": tiles}
    o, lse = flash_forward(q, k, v, **flags)
    gradients = flash_backward((q, k, v, o, lse), do, **flags, step=tile_gradients)
    assert all(torch.isfinite(part).all() for part in (o, lse, *gradients))
    assert not any(gradient[:, 16:].any() for gradient in gradients[1:])


@pytest.mark.parametrize(
    ("is_causal", "lengths", "crossed", "visited"),
    [
        (True, (16, 16), 4, 6),
        (True, (16, 40), 4, 6),
        (True, (20, 8), 2, 6),
        (False, (16, 16), 0, 8),
    ],
)
def test_only_tiles_on_the_diagonal_are_masked(
    is_causal: bool, lengths: tuple[int, int], crossed: int, visited: int
) -> None:
    """Counted by hand for tiles of 8 queries and 4 keys."""
    q, k, v, do = inputs(9, (2,), lengths, 4)
    masked: list[bool] = []

    def step(*args: Any) -> Any:
        masked.append(args[-1] is not None)
        return tile_gradients(*args)

    flags = {"is_causal": is_causal, "scale": 0.5, "tiles": SMALL}
    o, lse = flash_forward(q, k, v, **flags)
    flash_backward((q, k, v, o, lse), do, **flags, step=step)
    assert (sum(masked), len(masked)) == (crossed, visited)


class TestMemory:
    """What is kept for the backward pass, and how large anything made on the way is."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("leading", [(2,), (2, 4)])
    def test_saved_tensors(self, leading: tuple[int, ...], dtype: torch.dtype) -> None:
        """q, k, v themselves, O itself and one L; no copy in fp32."""
        q, k, v = (x.requires_grad_() for x in inputs(10, leading, (11, 7), 8, dtype)[:3])
        o = FlashAttentionTorch.apply(q, k, v)
        saved = o.grad_fn.saved_tensors
        assert [x.data_ptr() for x in saved[:4]] == [x.data_ptr() for x in (q, k, v, o)]
        lse = [x for x in saved if x.shape == (*leading, 11)]
        assert len(saved) == 5
        assert [x.dtype for x in lse] == [torch.float32]

    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_saved_bytes_are_linear(self, function: Any) -> None:
        for length in (64, 128, 256):
            qkv = [
                x.requires_grad_() for x in inputs(11, (3,), (length,) * 2, 8, torch.float16)[:3]
            ]
            case = Case(is_causal=True)
            kept = saved_bytes(lambda qkv=qkv, case=case: function.apply(*qkv, *case))
            assert kept == 3 * length * (4 * 8 * 2 + 4)

    def test_nothing_larger_than_the_inputs_is_made(self) -> None:
        """Neither scores of all keys nor keys repeated for a group of heads."""
        q, k, v, do = inputs(12, (2, 1), (64, 64), 4, group=8)
        flags = {"is_causal": False, "scale": 0.5, "tiles": Tiles(4, 4)}
        with LargestTensor() as forward:
            o, lse = flash_forward(q, k, v, **flags)
        with LargestTensor() as backward:
            flash_backward((q, k, v, o, lse), do, **flags, step=tile_gradients)
        assert forward.largest == backward.largest == q.numel()
        with LargestTensor() as plain:
            scaled_dot_prod_attention(q, k, v)
        assert plain.largest == 2 * 8 * 64 * 64


class LargestTensor(TorchDispatchMode):
    """Context that remembers the number of elements of the largest result of any operation."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        return result


class TestCompile:
    """torch.compile of the function, and the function whose backward pass is compiled."""

    @traces_a_function
    def test_one_graph_at_any_length(self) -> None:
        """The second length is where torch would try lengths that are not constants."""
        torch._dynamo.reset()
        function = torch.compile(FlashAttentionTorch.apply, fullgraph=True, backend="aot_eager")
        for length, scale in ((9, None), (10, 0.3)):
            *qkv, do = inputs(13, (2,), (length, length), 8)
            case = Case(True, scale, Tiles(8, 8))
            eager = run(qkv, do, case)
            leaves = [x.requires_grad_() for x in qkv]
            o = function(*leaves, *case)
            assert o.grad_fn.name() == "CompiledFunctionBackward"
            parts = [o, *torch.autograd.grad(o, leaves, do)]
            for mine, expected in zip(parts, [eager[0], *eager[2:]], strict=True):
                torch.testing.assert_close(mine, expected)

    @traces_a_function
    def test_one_tensor_as_all_three(self) -> None:
        torch._dynamo.reset()
        x = randn(14, 2, 9, 4).requires_grad_()
        compiled = torch.compile(flash_attention_torch, fullgraph=True, backend="aot_eager")
        o = compiled(x, x, x)
        assert o.grad_fn.name() == "CompiledFunctionBackward"
        (expected,) = torch.autograd.grad(flash_attention_torch(x, x, x).sum(), x)
        torch.testing.assert_close(torch.autograd.grad(o.sum(), x)[0], expected)

    @needs_compiler
    def test_compiled_backward(self) -> None:
        """Two graphs, with a mask and without, serve all dtypes, lengths and groups."""
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        tiles = Tiles(8, 6)
        for dtype, group, lengths in (
            (torch.float32, 1, (21, 23)),
            (torch.bfloat16, 2, (19, 33)),
            (torch.float16, 1, (35, 14)),
        ):
            *qkv, do = inputs(15, (2, 2), lengths, 8, dtype, group)
            for is_causal in (False, True):
                assert_right(qkv, do, Case(is_causal, 0.4, tiles), FlashAttentionTorchCompiled)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


class TestAutocast:
    """Inside an autocast region products run in its dtype, here with fp32 sums all the same."""

    @pytest.mark.parametrize("function", FUNCTIONS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_is_a_cast_of_the_inputs(self, function: Any, dtype: torch.dtype) -> None:
        *qkv, do = inputs(16, (2,), (13, 13), 8)
        qkv[1] = qkv[1].to(dtype)  # As a layer under autocast makes it.
        expected = run([x.to(dtype) for x in qkv], do.to(dtype), Case(True), function)
        with torch.autocast(DEVICE, dtype):
            got = run(qkv, do.to(dtype), Case(True), function)
        assert [x.dtype for x in got] == [dtype, torch.float32, torch.float32, dtype, torch.float32]
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine, theirs.to(mine.dtype))

    def test_fp64_is_left_alone(self) -> None:
        *qkv, do = inputs(17, (2,), (9, 9), 8, torch.float64)
        with torch.autocast(DEVICE, torch.bfloat16):
            got = run(qkv, do, Case())
        pairs = zip(got, run(qkv, do, Case()), strict=True)
        assert [torch.equal(*pair) for pair in pairs] == [True] * 5

    @traces_a_function
    def test_compiles(self) -> None:
        torch._dynamo.reset()
        function = torch.compile(FlashAttentionTorch.apply, fullgraph=True, backend="aot_eager")
        q, k, v = (x.requires_grad_() for x in inputs(18, (2,), (9, 9), 8)[:3])
        with torch.autocast(DEVICE, torch.bfloat16):
            o, eager = function(q, k, v), FlashAttentionTorch.apply(q, k, v)
        assert o.dtype == eager.dtype == torch.bfloat16
        assert torch.equal(o, eager)
        (dq,) = torch.autograd.grad(o.sum(), q)
        assert dq.dtype == torch.float32
        torch.testing.assert_close(dq, torch.autograd.grad(eager.sum(), q)[0])


class TestInterface:
    """The arguments as the course passes them, and errors."""

    def test_flag_is_positional_and_optional(self) -> None:
        q, k, v, _ = inputs(19, (2,), (9, 9), 4)
        causal = FlashAttentionTorch.apply(q, k, v, True)
        assert torch.equal(
            FlashAttentionTorch.apply(q, k, v), FlashAttentionTorch.apply(q, k, v, False)
        )
        assert not torch.equal(causal, FlashAttentionTorch.apply(q, k, v))
        assert torch.equal(causal[:, 0], v[:, 0])

    def test_gradients_without_the_optional_arguments(self) -> None:
        q, k, v = (x.requires_grad_() for x in inputs(19, (2,), (9, 9), 4)[:3])
        FlashAttentionTorch.apply(q, k, v).sum().backward()
        assert q.grad is not None
        assert k.grad is not None
        torch.testing.assert_close(v.grad.sum(), torch.tensor(2 * 9 * 4.0, device=DEVICE))

    @pytest.mark.parametrize("function", FUNCTIONS)
    def test_second_derivative_is_an_error(self, function: Any) -> None:
        """Also below a sum, where the output's gradient does not need one."""
        q, k, v = (x.requires_grad_() for x in inputs(20, (2,), (9, 9), 4)[:3])
        for loss in (torch.sum, torch.norm):
            o = function.apply(q, k, v)
            (dq,) = torch.autograd.grad(loss(o), q, create_graph=True)
            with pytest.raises(RuntimeError, match="must not be differentiated again"):
                torch.autograd.grad(dq.sum(), k)

    def test_graph_of_the_gradient_may_go_unused(self) -> None:
        q, k, v = (x.requires_grad_() for x in inputs(20, (2,), (9, 9), 4)[:3])
        plain = torch.autograd.grad(FlashAttentionTorch.apply(q, k, v).sum(), (q, k, v))
        o = FlashAttentionTorch.apply(q, k, v)
        graphed = torch.autograd.grad(o.sum(), (q, k, v), create_graph=True)
        assert [torch.equal(*pair) for pair in zip(plain, graphed, strict=True)] == [True] * 3

    def test_arguments_are_checked(self) -> None:
        q, k, v, _ = inputs(21, (2,), (9, 9), 4)
        with pytest.raises(UsageError, match="attention: key must have head dim 4, got 3"):
            FlashAttentionTorch.apply(q, k[..., :3], v)

    def test_meta_device(self) -> None:
        q, k, v = (torch.empty(2, 3, 9, 4, device="meta", requires_grad=True) for _ in range(3))
        o = attention(q, k, v, is_causal=True, kind="flash_attention_torch")
        assert o.shape == q.shape
        assert [g.shape for g in torch.autograd.grad(o.sum(), (q, k, v))] == [q.shape] * 3


class TestAdapters:
    """The names under which the course's tests look."""

    def test_pytorch(self) -> None:
        assert adapters.get_flashattention_autograd_function_pytorch() is FlashAttentionTorch

    def test_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Looked up when asked for: the module needs Triton."""
        module = SimpleNamespace(FlashAttentionTriton=object())
        monkeypatch.setitem(sys.modules, "cs336_systems.attention.flash_triton", module)
        found = adapters.get_flashattention_autograd_function_triton()
        assert found is module.FlashAttentionTriton
