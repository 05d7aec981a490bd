"""Closed forms of data parallelism against what they stand for: messages carried out one by one,
pipelines run bucket by bucket, device counts searched."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import ring_simulation as simulated
from hypothesis import assume, example, given
from hypothesis import strategies as st

from cs336_systems.config import PRESETS, preset
from cs336_systems.errors import UsageError
from cs336_systems.parallel import accounting, ffn_model
from cs336_systems.parallel.bucket_model import Gradients
from cs336_systems.parallel.ffn_model import Device, Layer
from cs336_systems.parallel.memory_model import MODELLED, Setting, Weights, rank_bytes
from cs336_systems.parallel.ring_model import ALL_REDUCES, all_reduce
from cs336_systems.parallel.scale_model import Mesh, Stack

ranks = st.integers(1, 17)

# --- all-reduce ---


@pytest.mark.parametrize("way", ALL_REDUCES)
@given(world_size=ranks, part_bytes=st.integers(1, 10**6))
@example(world_size=1, part_bytes=1)
@example(world_size=6, part_bytes=1)
def test_all_reduce_costs_what_its_messages_do(way: str, world_size: int, part_bytes: int) -> None:
    network: simulated.Network = getattr(simulated, way)(world_size)
    assert network.is_reduced
    found = all_reduce(way, world_size * part_bytes, world_size)
    assert found.num_steps == network.num_steps
    assert found.num_bytes == pytest.approx(network.num_parts_in_series * part_bytes)


def test_seconds_are_steps_and_bytes() -> None:
    assert all_reduce("ring", 8e9, 4).seconds(1e9, 0.5) == pytest.approx(6 * 0.5 + 12)
    assert all_reduce("tree", 8e9, 1).seconds(1e9, 0.5) == 0


@given(world_size=st.integers(2, 64), num_bytes=st.floats(1, 1e12))
def test_ring_carries_least(world_size: int, num_bytes: float) -> None:
    carried = {way: all_reduce(way, num_bytes, world_size).num_bytes for way in ALL_REDUCES}
    assert min(carried.values()) == pytest.approx(carried["ring"])


def test_all_reduce_refuses() -> None:
    with pytest.raises(UsageError, match=r"way must be one of ring, .* got 'star'"):
        all_reduce("star", 1, 2)
    with pytest.raises(UsageError, match="world_size must be at least 1, got 0"):
        all_reduce("ring", 1, 0)


# --- buckets ---


def exposed_by_pipeline(gradients: Gradients, num_buckets: int) -> float:
    """Fill and send bucket after bucket; filling one takes as long as its bytes take to travel."""
    share = gradients.num_bytes / num_buckets / gradients.bytes_per_s
    filled = arrived = 0.0
    for _ in range(num_buckets):
        filled += share
        arrived = max(filled, arrived) + share + gradients.call_seconds
    return arrived - filled


gradients = st.builds(
    Gradients,
    num_bytes=st.floats(1e3, 1e10),
    bytes_per_s=st.floats(1e6, 1e12),
    call_seconds=st.floats(1e-6, 1e-1),
)


@given(gradients, st.integers(1, 300))
def test_exposed_time_is_the_pipelines(given_gradients: Gradients, num_buckets: int) -> None:
    measured = exposed_by_pipeline(given_gradients, num_buckets)
    travel = given_gradients.num_bytes / given_gradients.bytes_per_s
    found = given_gradients.exposed_seconds(num_buckets)
    assert found == pytest.approx(measured, rel=1e-9, abs=1e-12 * travel)


@given(gradients)
@example(Gradients(num_bytes=1e3, bytes_per_s=1e12, call_seconds=0.1))  # One bucket is best.
def test_best_number_of_buckets_is_the_least_of_all(given_gradients: Gradients) -> None:
    best = given_gradients.best_num_buckets
    assume(best < 10_000)
    counts = np.arange(1, 4 * best + 10)
    times = given_gradients.num_bytes / counts / given_gradients.bytes_per_s
    times += counts * given_gradients.call_seconds
    assert given_gradients.exposed_seconds(best) == pytest.approx(times.min(), rel=1e-12)


@given(gradients)
def test_best_bucket_size_is_where_the_time_turns(given_gradients: Gradients) -> None:
    size, total = given_gradients.best_bucket_bytes, given_gradients.num_bytes
    least = given_gradients.least_exposed_seconds
    sizes = np.geomspace(size / 100, min(100 * size, total), 2001)
    times = [given_gradients.exposed_seconds(max(total / each, 1)) for each in sizes]
    assert min(times) >= least * (1 - 1e-12)
    assert min(times) == pytest.approx(least, rel=1e-4)


def test_buckets_refuse() -> None:
    with pytest.raises(UsageError, match="Gradients: call_seconds must be positive, got 0"):
        Gradients(num_bytes=1, bytes_per_s=1, call_seconds=0)
    with pytest.raises(UsageError, match="num_buckets must be at least 1, got 0"):
        Gradients(num_bytes=1, bytes_per_s=1, call_seconds=1).exposed_seconds(0)


# --- the stack of very large blocks ---

stacks = st.builds(
    Stack,
    d_model=st.integers(1, 64),
    d_ff=st.integers(1, 64),
    num_blocks=st.integers(1, 8),
)


@given(stacks, st.integers(1, 32))
def test_stack_counts_its_tensors(stack: Stack, num_tokens: int) -> None:
    wide, narrow = stack.d_ff, stack.d_model
    weights = [np.empty(shape, "f4") for shape in ((wide, narrow), (narrow, wide))]
    saved = [np.empty((num_tokens, width), "f2") for width in (narrow, wide)]
    assert stack.master_bytes == stack.num_blocks * sum(w.nbytes for w in weights)
    assert stack.state_bytes == 4 * stack.master_bytes
    assert stack.gradient_bytes + stack.optimizer_bytes == 3 * stack.master_bytes
    expected = stack.num_blocks * sum(a.nbytes for a in saved)
    assert stack.activation_bytes(num_tokens) == expected


@given(stacks, st.integers(0, 64), st.floats(0, 1), st.floats(1.01, 50))
@example(Stack(d_model=1, d_ff=1, num_blocks=1), 2, 0.0, 3.0)  # Three fit exactly.
def test_least_devices_are_the_first_that_fit(
    stack: Stack, num_tokens: int, sharded: float, room: float
) -> None:
    whole = (1 - sharded) * stack.activation_bytes(num_tokens)
    device_bytes = whole + stack.state_bytes / room
    searched = 1
    while stack.sharded_bytes(searched, num_tokens, sharded) > device_bytes:
        searched += 1
        assert searched < 10_000
    found = stack.least_devices(device_bytes, num_tokens, sharded)
    if found != searched:
        # Where a number fits exactly, a rounding may decide for the next one.
        assert abs(found - searched) == 1
        exactly = stack.sharded_bytes(min(found, searched), num_tokens, sharded)
        assert exactly == pytest.approx(device_bytes, rel=1e-12)


def test_activations_that_fill_a_device_are_refused() -> None:
    with pytest.raises(UsageError, match=r"num_tokens must leave room on a device of 9\.5e\+10"):
        Stack().least_devices(95e9, num_tokens=20_000)


def test_the_courses_numbers() -> None:
    """By hand: 2 x 16384 x 53248 x 126 weights; 16 bytes each; C / (Y W M_X)."""
    stack, mesh = Stack(), Mesh()
    assert stack.num_parameters == 219_848_638_464
    assert stack.state_bytes == 3_517_578_215_424
    assert stack.least_devices(80e9) == 44
    assert stack.least_devices(95e9) == 38
    assert stack.activation_bytes(1) == 17_547_264
    assert mesh.least_tokens_per_device == pytest.approx(319.44, abs=0.01)
    assert mesh.num_devices == 64


meshes = st.builds(
    Mesh,
    fsdp=st.integers(1, 64),
    tensor=st.integers(1, 32),
    fsdp_axes=st.integers(1, 3),
    tensor_axes=st.integers(1, 3),
)


@given(meshes, st.sampled_from([Stack(), Stack(d_model=4096, d_ff=14336)]))
@example(Mesh(), Stack())
def test_least_batch_is_where_a_search_finds_it(mesh: Mesh, stack: Stack) -> None:
    most = mesh.most_tensor(stack)
    assume(abs(mesh.tensor - most) > 1e-9)
    low, high = 0.0, 1e9
    if mesh.tensor > most:
        assert not mesh.is_compute_bound(stack, high)
        return
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if mesh.is_compute_bound(stack, middle) else (middle, high)
    assert high / mesh.num_devices == pytest.approx(mesh.least_tokens_per_device, rel=1e-9)


@given(st.integers(1, 3), st.integers(1, 3))
def test_no_split_does_with_a_smaller_batch(fsdp_axes: int, tensor_axes: int) -> None:
    stack = Stack()
    best = math.inf
    for tensor in np.linspace(1, 100, 5000):
        mesh = Mesh(tensor=tensor, fsdp_axes=fsdp_axes, tensor_axes=tensor_axes)
        if mesh.activation_seconds(stack, 1) <= mesh.compute_seconds(stack, 1):
            best = min(best, mesh.least_tokens_per_device)
    least = Mesh(fsdp_axes=fsdp_axes, tensor_axes=tensor_axes).least_tokens_at_any_split(stack)
    assert least <= best == pytest.approx(least, rel=2e-3)


# --- the gated feed-forward layer ---

layers = st.builds(
    Layer,
    num_tokens=st.integers(1, 400),
    d_model=st.integers(1, 64),
    d_ff=st.integers(1, 400),
)


def product(rows: Fraction, inner: Fraction, columns: Fraction) -> Fraction:
    """Return the FLOPs of one matrix product."""
    return 2 * rows * inner * columns


def products(tokens: Fraction, d_model: Fraction, d_ff: Fraction) -> tuple[Fraction, Fraction]:
    """Return the FLOPs of all products, forward and backward: input's and weight's gradients."""
    shapes = [(tokens, d_model, d_ff), (tokens, d_model, d_ff), (tokens, d_ff, d_model)]
    forward = sum(product(*shape) for shape in shapes)
    backward = sum(
        product(rows, columns, inner) + product(inner, rows, columns)
        for rows, inner, columns in shapes
    )
    return Fraction(forward), Fraction(backward)


@functools.cache
def parts_sent(collective: str, n: int) -> int:
    """Return how many of its n parts each rank sends in a simulated collective."""
    network: simulated.Network = getattr(simulated, collective)(n)
    (sent,) = set(network.num_parts_sent)
    return sent


def gathered(num_bytes: Fraction, n: int) -> Fraction:
    """Return what a rank sends in a simulated ring all-gather or reduce-scatter of so much."""
    return num_bytes * parts_sent("reduce_scatter", n) / n


def reduced(num_bytes: Fraction, n: int) -> Fraction:
    """Return what a rank sends in a simulated ring all-reduce of so much."""
    return num_bytes * parts_sent("ring", n) / n


def by_hand(layer: Layer, x: int, y: int, *, gathers: bool) -> list[tuple[Fraction, Fraction]]:
    """Return FLOPs and bytes of both passes with the batch cut in x and d_ff in y parts; `gathers`
    with the weights cut in x parts too."""
    tokens, wide = Fraction(layer.num_tokens, x), Fraction(layer.d_ff, y)
    narrow = Fraction(layer.d_model)
    weights, activations = 3 * narrow * wide * 2, tokens * narrow * 2
    once = gathered(weights, x)
    forward_bytes = (once if gathers else 0) + reduced(activations, y)
    # Gradients are scattered; data parallelism gathers them again, FSDP the weights.
    backward_bytes = 2 * once + reduced(activations, y)
    forward, backward = products(tokens, narrow, wide)
    return [(forward, Fraction(forward_bytes)), (backward, backward_bytes)]


@given(layers, st.integers(1, 6), st.integers(1, 6))
def test_passes_are_their_products_and_messages(layer: Layer, x: int, y: int) -> None:
    for found, expected in (
        (ffn_model.data_parallel(layer, x), by_hand(layer, x, 1, gathers=False)),
        (ffn_model.fsdp(layer, x), by_hand(layer, x, 1, gathers=True)),
        (ffn_model.tensor_parallel(layer, y), by_hand(layer, 1, y, gathers=True)),
        (ffn_model.fsdp_and_tensor(layer, x, y), by_hand(layer, x, y, gathers=True)),
    ):
        for each, (flops, num_bytes) in zip(found, expected, strict=True):
            assert each.flops == pytest.approx(float(flops))
            assert each.num_bytes == pytest.approx(float(num_bytes))


def test_seconds_and_bound_of_a_pass() -> None:
    device = Device(flops_per_s=100, bytes_per_s=10)
    each = ffn_model.Pass(flops=500, num_bytes=50)
    assert (each.compute_seconds(device), each.communication_seconds(device)) == (5, 5)
    assert each.is_compute_bound(device)
    assert not ffn_model.Pass(flops=500, num_bytes=51).is_compute_bound(device)


def is_bound_by_hand(layer: Layer, intensity: int, x: int, y: int, *, gathers: bool) -> bool:
    passes = by_hand(layer, x, y, gathers=gathers)
    return all(num_bytes * intensity <= flops for flops, num_bytes in passes)


@given(layers, st.integers(10, 100))
@example(Layer(num_tokens=200, d_model=1, d_ff=200), 100)  # All bounds are whole numbers.
def test_most_devices_are_the_last_of_a_search(layer: Layer, intensity: int) -> None:
    device = Device(flops_per_s=intensity * 7.0, bytes_per_s=7.0)
    for name, along_batch, gathers in (
        ("data parallel", True, False),
        ("fsdp", True, True),
        ("tensor parallel", False, True),
    ):
        num = 1
        while is_bound_by_hand(
            layer,
            intensity,
            num + 1 if along_batch else 1,
            1 if along_batch else num + 1,
            gathers=gathers,
        ):
            num += 1
        passes, most = ffn_model.DIVISIONS[name]
        assert most(layer, device) == num, name
        assert passes(layer, num).is_compute_bound(device)
        assert not passes(layer, num + 1).is_compute_bound(device)


@given(layers, st.integers(10, 60))
@example(Layer(num_tokens=1, d_model=1, d_ff=400), 10)  # FSDP's side is one device.
@example(Layer(num_tokens=400, d_model=1, d_ff=1), 10)  # The other's is.
def test_no_grid_of_whole_devices_is_larger_than_the_best(layer: Layer, intensity: int) -> None:
    device = Device(flops_per_s=float(intensity), bytes_per_s=1.0)
    grid = ffn_model.best_grid(layer, device)
    assert min(grid) >= 1
    fits = [
        x * y
        for x in range(1, layer.num_tokens // intensity + 2)
        for y in range(1, 3 * layer.d_ff // (2 * intensity) + 2)
        if ffn_model.fsdp_and_tensor(layer, x, y).is_compute_bound(device)
    ]
    assert max(fits) <= grid.num_devices * (1 + 1e-9)
    # It is within what it promises: the whole part of it is compute-bound.
    assert max(fits) >= math.floor(grid.fsdp) * math.floor(grid.tensor)


@given(st.floats(2, 50), st.floats(2, 50), st.floats(0.01, 0.99))
def test_best_grid_is_on_the_bound_and_above_its_neighbours(
    fsdp_side: float, tensor_side: float, share: float
) -> None:
    layer = Layer(num_tokens=round(1000 * fsdp_side), d_ff=round(1000 * tensor_side))
    device = Device(flops_per_s=500.0, bytes_per_s=1.0)
    best = ffn_model.best_grid(layer, device)
    slack = 6 * layer.d_ff * layer.num_tokens / 500

    def tensor_beside(x: float) -> float:
        return 1 + (slack - 6 * layer.d_ff * (x - 1)) / (4 * layer.num_tokens)

    assert best.tensor == pytest.approx(tensor_beside(best.fsdp))
    other = 1 + share * (layer.num_tokens / 500)
    assert other * tensor_beside(other) <= best.num_devices * (1 + 1e-9)


# --- memory ---


def test_weights_of_a_model_are_its_modules() -> None:
    from cs336_systems.model import build_model

    for name in ("debug", "tiny"):
        config = preset(name, context_length=16)
        model = build_model(config, attention="scaled_dot_prod_attention", device="cpu")
        numels = {key: parameter.numel() for key, parameter in model.named_parameters()}
        found = Weights.of(config)
        assert found.total == sum(numels.values())
        blocks = sum(numel for key, numel in numels.items() if key.startswith("layers.0."))
        norms = [numel for key, numel in numels.items() if "ln" in key or "norm" in key]
        assert norms
        assert found.replicated == sum(norms)
        own_norms = [n for k, n in numels.items() if k.startswith("layers.0.") and "ln" in k]
        others = [n for k, n in numels.items() if not k.startswith("layers.") and "ln" not in k]
        assert found.largest_unit == max(blocks - sum(own_norms), *others)


@pytest.mark.parametrize("strategy", MODELLED)
@pytest.mark.parametrize("size", PRESETS)
def test_one_rank_holds_all_and_more_ranks_never_more(strategy: str, size: str) -> None:
    weights = Weights.of(preset(size))
    found = [rank_bytes(strategy, Setting(weights=weights, world_size=n)) for n in (1, 2, 4, 8)]
    # What ranks exchange gradients through is there from two ranks on, whatever their number.
    exchanged = min(128 * 2**20, 4 * weights.total) if strategy == "flashddp_ce" else 0
    assert [each.communication for each in found] == [0, exchanged, exchanged, exchanged]
    held = [each.held - each.communication for each in found]
    assert held[0] == 16 * weights.total
    assert held == sorted(held, reverse=True)
    shards = {"zero1": 8 + 8 / 8, "fsdp": 16 / 8}
    expected = shards.get(strategy, 16) * weights.total
    assert held[-1] == pytest.approx(expected, rel=0 if strategy != "fsdp" else 0.05)


def test_memory_refuses() -> None:
    weights = Weights(total=1, replicated=0, largest_unit=1)
    with pytest.raises(UsageError, match=r"strategy must be one of none, naive, .* got 'zero9'"):
        rank_bytes("zero9", Setting(weights=weights, world_size=1))
    with pytest.raises(UsageError, match="world_size must be at least 1, got 0"):
        Setting(weights=weights, world_size=0)


# --- the command line ---


def test_program_prints_every_table_without_torch() -> None:
    code = "import sys; from cs336_systems.parallel.accounting import main; main([]); "
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    titles = [line for line in done.stdout.splitlines() if line.startswith("## ")]
    assert len(titles) == len(accounting.TABLES)
    assert "| compute-bound tokens a device, X=16 over 2 axes, Y=4 | 319.4" in done.stdout


@pytest.mark.parametrize("table", accounting.TABLES)
@pytest.mark.parametrize("options", [[], ["--world-size=8", "--communication-bytes=2"]])
def test_each_table_has_lines(
    table: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert accounting.main([table, "--size=small", *options]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) >= 5
    assert "nan" not in "".join(lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size=0"], "--world-size must be at least 1, got 0"),
        (["tabel"], "TABLE must be one of memory, buckets, all_reduce, ffn, scale, got 'tabel'"),
        (["buckets", "--call-seconds=0"], "Gradients: call_seconds must be positive, got 0.0"),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        accounting.main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
