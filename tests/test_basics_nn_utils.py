"""Are softmax, cross-entropy and gradient clipping torch's, for extreme values too?"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cs336_basics.nn_utils import clip_gradient, cross_entropy, log_softmax, softmax
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32, torch.float64)
SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def worst(x: Tensor, truth: Tensor) -> float:
    return (x.double() - truth).abs().max().item()


# --- softmax and log_softmax ------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, scale=st.sampled_from([1.0, 30.0, 1e4]), seed=SEEDS, data=st.data())
def test_softmax_and_its_gradient_equal_torch(
    shape: list[int], scale: float, seed: int, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = (scale * normal(*shape, seed=seed)).requires_grad_()
    weights = normal(*shape, seed=seed + 1)
    for ours, theirs in [(softmax, torch.softmax), (log_softmax, torch.log_softmax)]:
        y, expected = ours(x, dim), theirs(x, dim)
        assert_close(y, expected)
        (gradient,) = torch.autograd.grad((weights * y).sum(), x)
        (expected_gradient,) = torch.autograd.grad((weights * expected).sum(), x)
        assert_close(gradient, expected_gradient, atol=1e-12, rtol=1e-7)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_is_as_exact_as_torch_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    ours, theirs = {
        "softmax": (softmax, torch.softmax),
        "log_softmax": (log_softmax, torch.log_softmax),
    }[name]
    x = normal(16, 500, dtype=dtype)
    truth = theirs(x.double(), -1)
    y = ours(x, -1)
    assert y.dtype == dtype
    # In fp64 truth is torch's own answer, and only rounding is left.
    rounding = 4 * torch.finfo(dtype).eps * truth.abs().max().item()
    assert worst(y, truth) <= 2 * worst(theirs(x, -1), truth) + (
        rounding if dtype == torch.float64 else 0.0
    )


def test_log_softmax_takes_the_last_dim_unless_told() -> None:
    x = normal(2, 3)
    assert torch.equal(log_softmax(x), log_softmax(x, dim=-1))


@pytest.mark.parametrize("function", [softmax, log_softmax])
def test_masked_logits_have_no_share_and_no_gradient(function) -> None:  # type: ignore[no-untyped-def]
    x = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf] * 3], requires_grad=True)
    y = function(x, -1)
    probabilities = y if function is softmax else y.exp()
    assert torch.equal(probabilities[1], torch.zeros(3))
    expected = torch.softmax(torch.tensor([0.0, 1.0]), 0)
    assert probabilities[0, 1] == 0
    assert_close(probabilities[0, ::2], expected)
    (gradient,) = torch.autograd.grad(y[0, 0], x)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 1] == 0
    assert torch.equal(gradient[1], torch.zeros(3))


# --- cross-entropy ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    lead=st.lists(st.integers(1, 4), max_size=3),
    vocab=st.integers(1, 9),
    scale=st.sampled_from([1.0, 1e4]),
    seed=SEEDS,
)
@example(lead=[], vocab=1, scale=1.0, seed=0)
def test_cross_entropy_and_its_gradient_equal_torch(
    lead: list[int], vocab: int, scale: float, seed: int
) -> None:
    logits = (scale * normal(*lead, vocab, seed=seed)).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocab, lead, generator=generator)
    ours = cross_entropy(logits, targets)
    theirs = F.cross_entropy(logits.reshape(-1, vocab), targets.reshape(-1))
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits))


@pytest.mark.parametrize("scale", [5.0, 1e4])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_cross_entropy_is_as_exact_as_torch(dtype: torch.dtype, scale: float) -> None:
    logits = (scale * normal(32, 1000, dtype=dtype)).requires_grad_()
    targets = torch.arange(32) * 30
    exact = logits.detach().double().requires_grad_()
    truth = F.cross_entropy(exact, targets)
    (true_gradient,) = torch.autograd.grad(truth, exact)
    ours, theirs = cross_entropy(logits, targets), F.cross_entropy(logits.float(), targets)
    assert ours.dtype == torch.float32
    ulp = torch.finfo(torch.float32).eps * truth.item()
    assert worst(ours, truth) <= 2 * worst(theirs, truth) + 2 * ulp
    (our_gradient,), (their_gradient,) = (
        torch.autograd.grad(loss, logits) for loss in (ours, theirs)
    )
    assert our_gradient.dtype == dtype
    assert worst(our_gradient, true_gradient) <= 2 * worst(their_gradient, true_gradient)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_confident_prediction_still_has_a_gradient_in_half_precision(dtype: torch.dtype) -> None:
    # p = 0.9991 rounds to one in bf16: p - 1 must be formed before rounding.
    logits = torch.tensor([[7.0, 0.0]], dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(cross_entropy(logits, torch.tensor([0])), logits)
    expected = -1 / (1 + math.exp(7))
    assert gradient[0, 0].item() == pytest.approx(expected, rel=torch.finfo(dtype).eps)


def test_cross_entropy_allows_a_masked_vocabulary() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([2]))
    assert_close(loss, torch.tensor(math.log1p(math.exp(-1))))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert_close(gradient[0, 1], torch.tensor(0.0))
    assert torch.isfinite(gradient).all()
    assert cross_entropy(logits, torch.tensor([1])).item() == math.inf


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32], ids=str)
def test_cross_entropy_takes_targets_of_any_integer_type(dtype: torch.dtype) -> None:
    logits, targets = normal(3, 5), torch.tensor([0, 4, 2])
    assert torch.equal(cross_entropy(logits, targets.to(dtype)), cross_entropy(logits, targets))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"got inputs \(2, 5\) and targets \(3,\)"),
        (torch.zeros(2, 1, dtype=torch.int64), r"got inputs \(2, 5\) and targets \(2, 1\)"),
        (torch.zeros(2), "targets must be integers, got torch.float32"),
        (torch.tensor([0, 5]), r"targets must be in \[0, 5\), got 5"),
        (torch.tensor([-100, 0]), r"targets must be in \[0, 5\), got -100"),
    ],
)
def test_cross_entropy_names_bad_targets(targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"cross_entropy: .*{message}"):
        cross_entropy(torch.zeros(2, 5), targets)


def test_cross_entropy_refuses_a_scalar() -> None:
    with pytest.raises(ValueError, match="cross_entropy: targets must have the shape of inputs"):
        cross_entropy(torch.tensor(1.0), torch.tensor(0))


# --- gradient clipping ------------------------------------------------------------------------


def parameters_with_gradients(
    shapes: list[list[int]], seed: int, dtype: torch.dtype = torch.float64
) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    for i, parameter in enumerate(parameters):
        parameter.grad = normal(*parameter.shape, seed=seed + i, dtype=dtype)
    return parameters


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=4),
    max_norm=st.sampled_from([1e-3, 1.0, 1e3, math.inf]),
    seed=st.integers(0, 2**31),
)
def test_clipping_equals_torch(shapes: list[list[int]], max_norm: float, seed: int) -> None:
    ours, theirs = (parameters_with_gradients(shapes, seed) for _ in range(2))
    norm = clip_gradient(iter(ours), max_norm)
    assert_close(norm, nn.utils.clip_grad_norm_(theirs, max_norm))
    for parameter, expected in zip(ours, theirs, strict=True):
        assert_close(parameter.grad, expected.grad)


def test_clipping_works_in_place_and_leaves_small_gradients_alone() -> None:
    (parameter,) = parameters_with_gradients([[3, 4]], seed=0)
    gradient = parameter.grad
    assert gradient is not None
    before = gradient.clone()
    norm = clip_gradient([parameter], max_norm=2 * before.norm().item())
    assert_close(norm, before.norm())
    assert torch.equal(gradient, before)
    clip_gradient([parameter], max_norm=0.5)
    assert parameter.grad is gradient
    assert_close(gradient, before * (0.5 / (before.norm() + 1e-6)))


def test_clipping_ignores_missing_gradients_and_counts_a_tied_parameter_once() -> None:
    (parameter,) = parameters_with_gradients([[3]], seed=0)
    assert parameter.grad is not None
    before = parameter.grad.clone()
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    norm = clip_gradient((p for p in [frozen, parameter, parameter]), max_norm=1e-2)
    assert_close(norm, before.norm())
    assert_close(parameter.grad, before * (1e-2 / (before.norm() + 1e-6)))
    assert frozen.grad is None


def test_clipping_takes_one_tensor_and_no_gradients_at_all() -> None:
    (parameter,) = parameters_with_gradients([[2, 2]], seed=0)
    assert parameter.grad is not None
    assert_close(clip_gradient(parameter, 1.0), normal(2, 2).norm())
    assert clip_gradient([nn.Parameter(torch.ones(2))], 1.0).item() == 0
    assert clip_gradient([], 1.0).item() == 0


def test_clipping_mixes_dtypes_and_sums_in_fp32() -> None:
    parameters = [
        parameters_with_gradients([[1000]], seed=i, dtype=dtype)[0]
        for i, dtype in enumerate(FLOATS)
    ]
    truth = torch.cat([p.grad.double() for p in parameters if p.grad is not None]).norm()
    dtypes = [p.grad.dtype for p in parameters if p.grad is not None]
    norm = clip_gradient(parameters, 1.0)
    assert norm.dtype == torch.float64
    assert_close(norm, truth, rtol=4 * torch.finfo(torch.float32).eps, atol=0.0)
    assert [p.grad.dtype for p in parameters if p.grad is not None] == dtypes
    after = torch.cat([p.grad.double() for p in parameters if p.grad is not None]).norm()
    assert after.item() == pytest.approx(1.0, rel=torch.finfo(torch.bfloat16).eps)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_clipping_spans_devices() -> None:
    on_host, on_device = parameters_with_gradients([[3], [4]], seed=0)
    moved = nn.Parameter(on_device.detach().cuda())
    assert on_host.grad is not None
    assert on_device.grad is not None
    moved.grad = on_device.grad.cuda()
    norm = clip_gradient([on_host, moved], 0.5)
    expected = clip_gradient(parameters_with_gradients([[3], [4]], seed=0), 0.5)
    assert_close(norm, expected)
    # Short of 0.5 by the 1e-6 that keeps the divisor from zero, which is not rounding.
    clipped = torch.cat([on_host.grad, moved.grad.cpu()]).norm().item()
    assert_close(clipped, 0.5 * norm.item() / (norm.item() + 1e-6))


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_clipping_refuses_a_norm_that_is_not_positive(max_norm: float) -> None:
    with pytest.raises(ValueError, match="clip_gradient: max_norm must be positive, got"):
        clip_gradient([], max_norm)
