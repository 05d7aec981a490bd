"""The clocks: they measure a known delay, and the harness notices when nothing is waited for."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from cs336_systems.measure.clock import EventClock, ReplayClock, WallClock, synchronizer

DELAY_MS = 20.0
TOLERANCE = 0.05


class AsynchronousDevice:
    """A stand-in for a GPU: work is queued and done later, by a thread."""

    def __init__(self) -> None:
        self._work: queue.Queue[float | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def launch(self, seconds: float) -> None:
        """Queue work and return at once."""
        self._work.put(seconds)

    def synchronize(self) -> None:
        """Wait for everything queued."""
        self._work.join()

    def close(self) -> None:
        """End the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (seconds := self._work.get()) is not None:
            time.sleep(seconds)
            self._work.task_done()


@pytest.fixture
def asynchronous_device() -> Iterator[AsynchronousDevice]:
    device = AsynchronousDevice()
    yield device
    device.close()


def measured_ms(clock: Callable[[], float], step: Callable[[], object]) -> float:
    """Return the median of three rounds, read as pytest-benchmark reads a timer."""
    rounds = []
    for _ in range(3):
        start = clock()
        step()
        rounds.append(1e3 * (clock() - start))
    return sorted(rounds)[1]


def assert_measures_the_delay(clock: Callable[[], float], step: Callable[[], object]) -> None:
    got = measured_ms(clock, step)
    assert got == pytest.approx(DELAY_MS, rel=TOLERANCE), f"{DELAY_MS} ms measured as {got:.3f} ms"


def test_wall_clock_measures_queued_work(asynchronous_device: AsynchronousDevice) -> None:
    clock = WallClock(asynchronous_device.synchronize)
    assert_measures_the_delay(clock, lambda: asynchronous_device.launch(DELAY_MS / 1e3))


def test_self_check_fails_without_synchronisation(asynchronous_device: AsynchronousDevice) -> None:
    clock = WallClock(lambda: None)
    with pytest.raises(AssertionError, match="measured as 0"):
        assert_measures_the_delay(clock, lambda: asynchronous_device.launch(DELAY_MS / 1e3))


def test_work_queued_before_is_not_counted(asynchronous_device: AsynchronousDevice) -> None:
    clock = WallClock(asynchronous_device.synchronize)
    asynchronous_device.launch(0.1)
    start = clock()
    assert clock() - start < 0.05


def test_a_cpu_has_nothing_to_wait_for() -> None:
    start = time.perf_counter()
    synchronizer(torch.device("cpu"))()
    assert time.perf_counter() - start < 0.01


def test_replay_clock_gives_one_time_a_pair() -> None:
    clock = ReplayClock([0.5, 0.25])
    differences = []
    for _ in range(2):
        start = clock()
        differences.append(clock() - start)
    assert differences == [0.5, 0.25]


@pytest.mark.gpu
class TestOnTheDevice:
    """The same on a real GPU, whose own timer says how long the work took."""

    @pytest.fixture
    def step(self) -> Callable[[], None]:
        from cs336_systems.measure.delay import spin

        elapsed = torch.zeros(1, dtype=torch.int64, device="cuda")

        def run() -> None:
            spin(elapsed, DELAY_MS)

        run()  # Compiles.
        torch.cuda.synchronize()
        assert elapsed.item() == pytest.approx(DELAY_MS * 1e6, rel=TOLERANCE)
        return run

    def test_wall_clock(self, step: Callable[[], None]) -> None:
        assert_measures_the_delay(WallClock(torch.cuda.synchronize), step)

    def test_event_clock(self, step: Callable[[], None]) -> None:
        assert_measures_the_delay(EventClock(), step)

    def test_self_check_fails_without_synchronisation(self, step: Callable[[], None]) -> None:
        with pytest.raises(AssertionError, match="measured as 0"):
            assert_measures_the_delay(WallClock(lambda: None), step)
        torch.cuda.synchronize()

    def test_event_clock_does_not_count_launching_behind_queued_work(
        self, step: Callable[[], None]
    ) -> None:
        clock = EventClock()
        step()  # Keeps the device busy while the host dawdles.
        start = clock()
        time.sleep(DELAY_MS / 4e3)
        step()
        assert 1e3 * (clock() - start) == pytest.approx(DELAY_MS, rel=TOLERANCE)
