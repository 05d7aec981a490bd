"""Bytes on the wire against rings carried out part by part, and what ranks hold against what their
strategy says."""

from __future__ import annotations

import pytest
import ring_simulation as simulated
import torch
import traffic_ranks
from cs336_basics.optimizer import AdamW
from hypothesis import example, given
from hypothesis import strategies as st
from parallel_fixtures import ON_RANKS
from ranks import pool
from torch import nn

from cs336_systems.errors import UsageError
from cs336_systems.parallel import STRATEGIES
from cs336_systems.parallel.collectives import Collective
from cs336_systems.parallel.held import held_bytes
from cs336_systems.parallel.memory_model import RankBytes, Setting, Weights, rank_bytes
from cs336_systems.parallel.traffic import RING, Traffic, bandwidth, traffic, wire_bytes

OWN = [name for name, row in STRATEGIES.items() if not row.peer]
BF16 = {"communication_dtype": torch.bfloat16}
FP32_BYTES = 4


def busiest(name: str, n: int) -> int:
    """Return the parts that the busiest rank sends in a simulated collective."""
    if name == "all_reduce":
        network = simulated.ring(n)
    elif name == "broadcast":
        network = simulated.broadcast(n)
    else:
        # An all-gather is a reduce-scatter run backwards.
        network = simulated.reduce_scatter(n)
    return max(network.num_parts_sent)


def call(name: str, num_bytes: int, n: int) -> Collective:
    return Collective(name, num_bytes // FP32_BYTES, torch.float32, num_bytes, n)


@given(st.sampled_from(RING), st.integers(1, 9), st.integers(1, 10**9))
@example("broadcast", 1, 1)
def test_wire_bytes_are_the_rings(name: str, n: int, part_bytes: int) -> None:
    assert wire_bytes([call(name, n * part_bytes, n)]) == pytest.approx(
        busiest(name, n) * part_bytes
    )


def test_gather_sends_as_much_as_reduce_scatter() -> None:
    network = simulated.reduce_scatter(5)
    before = list(network.num_parts_sent)
    simulated.all_gather(network)
    assert network.num_parts_sent == [2 * sent for sent in before]


@given(st.sampled_from(RING), st.integers(2, 9), st.floats(1e6, 1e12))
def test_bus_bandwidth_is_the_links(name: str, n: int, bytes_per_s: float) -> None:
    """Whatever the collective and the number of ranks, where links work all the time."""
    part_bytes = 1000
    seconds = busiest(name, n) * part_bytes / bytes_per_s
    found = bandwidth(name, n * part_bytes, n, seconds)
    assert found.bus == pytest.approx(bytes_per_s)
    assert found.algorithm == pytest.approx(n * part_bytes / seconds)


def test_traffic_adds_up_by_name() -> None:
    log = [call("all_reduce", 40, 4), call("broadcast", 8, 4), call("all_reduce", 20, 4)]
    found = traffic(log)
    assert list(found) == ["all_reduce", "broadcast"]
    assert found["all_reduce"] == Traffic(2, 60, 90.0)
    assert sum(each.wire_bytes for each in found.values()) == wire_bytes(log) == 98


def test_traffic_refuses() -> None:
    with pytest.raises(UsageError, match=r"collective must be one of all_reduce, .* got 'gossip'"):
        wire_bytes([call("gossip", 4, 2)])
    with pytest.raises(UsageError, match="seconds must be positive, got 0"):
        bandwidth("all_reduce", 4, 2, 0.0)
    with pytest.raises(UsageError, match="world_size must be at least 1, got 0"):
        bandwidth("all_reduce", 4, 0, 1.0)


# --- memory of one process ---


def test_tied_weights_and_views_count_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    flat = torch.zeros(100)
    model[0].weight.grad = flat[:64].view(8, 8)
    model.register_buffer("seen", torch.zeros(3))
    found = held_bytes(model)
    assert (found.parameters, found.gradients, found.buffers) == (256, 400, 12)
    assert (found.optimizer_state, found.communication, found.activations) == (0, 0, None)
    assert found.known == 668


def test_state_appears_with_the_first_step_and_activations_are_the_rest() -> None:
    model = nn.Linear(16, 16, bias=False)
    optimizer = AdamW(model.parameters())
    assert held_bytes(model, optimizer).optimizer_state == 0
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    found = held_bytes(model, optimizer, peak_bytes=10_000)
    assert found.optimizer_state == 2 * found.parameters == 2 * 1024
    assert found.activations == 10_000 - 4 * 1024
    with pytest.raises(UsageError, match="peak_bytes must be at least the 4096 that are held, got"):
        held_bytes(model, optimizer, peak_bytes=4095)


# --- memory of ranks ---


def predicted(strategy: str, *, communication_bytes: int | None) -> RankBytes:
    weights = Weights(
        total=traffic_ranks.SHARDED + traffic_ranks.REPLICATED,
        replicated=traffic_ranks.REPLICATED,
        largest_unit=traffic_ranks.LARGEST_UNIT,
    )
    setting = Setting(weights=weights, world_size=2, communication_bytes=communication_bytes)
    return rank_bytes(strategy, setting)


def looked(strategy: str, half: bool) -> list[traffic_ranks.Looked]:
    options = BF16 if half else {}
    return pool(2).run(traffic_ranks.step, strategy, **options)


# The step's report and the like: a few numbers a tensor.
SMALL_BYTES = 128 * traffic_ranks.NUM_TENSORS


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("strategy", OWN)
class TestOnRanks:
    """Every strategy of this project's own, with gradients that travel as they are and in bf16."""

    pytestmark = ON_RANKS

    def test_ranks_hold_what_is_predicted(self, strategy: str, half: bool) -> None:
        found = [each.after_step for each in looked(strategy, half)]
        expected = predicted(strategy, communication_bytes=2 if half else None)
        for each in found:
            assert each.parameters == expected.parameters
            assert each.gradients == expected.gradients
            assert 0 <= each.communication - expected.communication <= SMALL_BYTES
        # ZeRO's ranks own whole parameters, and so share as evenly as those allow.
        assert sum(each.optimizer_state for each in found) == 2 * expected.optimizer_state

    def test_before_a_step_there_is_no_state(self, strategy: str, half: bool) -> None:
        for each in looked(strategy, half):
            assert each.fresh.optimizer_state == 0
            assert each.fresh.parameters == each.after_step.parameters
            assert each.fresh.gradients in (0, each.after_step.gradients)

    def test_what_is_sent_is_recorded(self, strategy: str, half: bool) -> None:
        total = traffic_ranks.SHARDED + traffic_ranks.REPLICATED
        for each in looked(strategy, half):
            sent = traffic(each.log)
            if strategy == "none":
                assert sent == {}
                continue
            if strategy == "fsdp":
                # Gathered in fp32; all but the last unit once more for the backward pass.
                gathered = sent["all_gather_into"].message_bytes / FP32_BYTES
                assert traffic_ranks.SHARDED <= gathered <= 2 * traffic_ranks.SHARDED
                reduced = sent["reduce_scatter_into"].message_bytes
                assert reduced == traffic_ranks.SHARDED * (2 if half else FP32_BYTES)
                total = traffic_ranks.REPLICATED
            gradients = total * (2 if half else FP32_BYTES)
            # Between two ranks each sends half of what it has, and gets as much back.
            extra = sent["all_reduce"].wire_bytes - gradients
            assert 0 < extra <= SMALL_BYTES
            if strategy == "zero1":
                assert sent["broadcast"].message_bytes == total * FP32_BYTES


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("strategy", ["naive", "flat"])
class TestCopies:
    """What comes and goes within a step."""

    pytestmark = ON_RANKS

    def test_finishing_allocates_what_is_predicted(self, strategy: str, half: bool) -> None:
        expected = predicted(strategy, communication_bytes=2 if half else None).transient
        for each in looked(strategy, half):
            assert 0 <= each.finish_peak_bytes - expected <= SMALL_BYTES


@pytest.mark.parametrize("half", [False, True])
class TestCasts:
    """Casts that travel during the backward pass are there until it is finished."""

    pytestmark = ON_RANKS

    def test_casts_in_flight(self, half: bool) -> None:
        expected = predicted("overlapped", communication_bytes=2 if half else None).transient
        assert (expected > 0) == half
        for each in looked("overlapped", half):
            assert 0 <= each.before_finish.communication - expected <= SMALL_BYTES
            assert each.after_step.communication <= SMALL_BYTES
