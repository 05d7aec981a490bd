"""Measured tiles: the fastest of those that agree, kept in a file, and never a changed result."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_within_budget, term_magnitudes
from torch import Tensor
from triton.runtime.errors import OutOfResources

from cs336_systems.attention import autotune, tile_cache, triton_launch, triton_run
from cs336_systems.attention.autotune import Tuner
from cs336_systems.attention.flash_triton import flash_attention_triton
from cs336_systems.attention.plain import scaled_dot_prod_attention
from cs336_systems.attention.reference import reference_gradients
from cs336_systems.attention.tile_candidates import candidates
from cs336_systems.attention.tiles import Tile, tiles_for
from cs336_systems.attention.triton_backward import keys_kernel, queries_kernel
from cs336_systems.attention.triton_forward import forward_kernel
from cs336_systems.attention.triton_launch import Launch
from cs336_systems.errors import UsageError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
KERNELS = ["forward", "one_pass", "keys", "queries"]
TABLE = Tile(block_m=64, block_n=32, num_warps=4, num_stages=2)
TILES = candidates("forward", TABLE, dtype=torch.float16, pad=16, tma=False)
Shape = tuple[int, int, int, int]


def shape_of(one: Launch | Tile) -> Shape:
    """Return block_m, block_n, num_warps and num_stages."""
    if isinstance(one, Tile):
        return one.block_m, one.block_n, one.num_warps, one.num_stages
    given, options = one.arguments, one.options
    return given["BLOCK_M"], given["BLOCK_N"], options["num_warps"], options["num_stages"]


class FakeClock:
    """Says what it was told of a tile, and which tiles it was asked about."""

    def __init__(self, fast: Callable[[Launch], bool] = lambda launch: False) -> None:
        self.fast = fast
        self.timed: list[Shape] = []

    def __call__(self, work: Callable[[], object]) -> float:
        assert isinstance(work, partial)
        (launch,) = work.args
        self.timed.append(shape_of(launch))
        return 1.0 if self.fast(launch) else 2.0


def no_clock(work: Callable[[], object]) -> float:
    """Fail: nothing should be timed."""
    raise AssertionError("timed")


def ask(tuner: Tuner, length: int = 33, causal: bool = True, head_dim: int = 16) -> Tile:
    """Return the tuner's tile for a forward pass."""
    q = torch.ones(1, 1, length, head_dim, dtype=torch.float16, device=DEVICE)
    made = {"o": torch.full_like(q, 7.0), "lse": torch.full_like(q[..., 0], 7.0).float()}

    def plan(made: Any, tile: Tile) -> Launch:
        how: dict[str, Any] = {"causal": causal, "scale": 1.0, "precision": "ieee"}
        return triton_launch.plan_forward(q, q, q, made["o"], made["lse"], **how, tile=tile)

    tile = tuner.tile("forward", TABLE, made, plan)
    assert all((tensor == 7.0).all() for tensor in made.values())
    return tile


def fill(launch: Launch) -> None:
    """Stand in for the forward kernel, in no time."""
    launch.arguments["o_ptr"].fill_(1.0)
    launch.arguments["lse_ptr"].fill_(1.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tiles.json"


@pytest.fixture
def no_plans() -> Iterator[None]:
    """Plans of other tests must not be replayed here, nor these elsewhere."""
    triton_run._REPLAYS.clear()
    yield
    triton_run._REPLAYS.clear()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, no_plans: None) -> list[Launch]:
    """All that is launched for a caller; a tuner keeps to the launch that it was made with."""
    seen: list[Launch] = []
    original = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (seen.append(self), original(self))[1])
    return seen


def switch_on(monkeypatch: pytest.MonkeyPatch, tuner: Tuner) -> None:
    monkeypatch.setenv(autotune.VARIABLE, "1")
    monkeypatch.setattr(autotune, "_tuner", lambda: tuner)


def make(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, 2, 70, 16), (1, 1, 40, 16), (1, 1, 40, 16), (1, 2, 70, 16)]
    q, k, v, do = (torch.randn(s, generator=generator).to(DEVICE, torch.float16) for s in shapes)
    for leaf in (q, k, v):
        leaf.requires_grad_()
    return q, k, v, do


def run(function: Any, *, deterministic: bool | None = None) -> list[Tensor]:
    """Return the output and the three gradients."""
    q, k, v, do = make()
    how = {} if deterministic is None else {"deterministic": deterministic}
    o = function(q, k, v, is_causal=True, **how)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), do)]


def kernel_of(launch: Launch) -> str | None:
    """Return the name by which the kernel's tile is chosen."""
    if launch.kernel is keys_kernel:
        return "one_pass" if launch.arguments["ADD_DQ"] else "keys"
    return {forward_kernel: "forward", queries_kernel: "queries"}.get(launch.kernel)


def tiled(launched: list[Launch]) -> dict[str, Shape]:
    """Return the tiles that kernels were launched with."""
    return {name: shape_of(launch) for launch in launched if (name := kernel_of(launch))}


def table_tiles() -> dict[str, Shape]:
    tiles = tiles_for(make()[0])
    assert tiles.one_pass is not None
    found = {"forward": tiles.forward, "one_pass": tiles.one_pass}
    found |= {"keys": tiles.keys, "queries": tiles.queries}
    return {name: shape_of(tile) for name, tile in found.items()}


class TestCandidates:
    """What may be launched at all."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("tma", [False, True])
    def test_lists(self, kernel: str, dtype: torch.dtype, tma: bool) -> None:
        table = Tile(block_m=64, block_n=64, num_warps=4, num_stages=1, tma=tma, spilled_bytes=8)
        first, *others = candidates(kernel, table, dtype=dtype, pad=64, tma=tma)
        assert first == table
        assert len(set(others)) == len(others)
        assert all(128 % tile.block_m == 0 and tile.num_stages >= 2 for tile in others)
        assert {tile.tma for tile in others} <= {tma, False}
        if kernel == "one_pass":
            assert bool(others) == (dtype != torch.float32)
            assert all(tile.block_m >= 32 for tile in others)
        else:
            assert others

    def test_the_tables_own_is_there_once(self) -> None:
        own = Tile(block_m=64, block_n=64, num_warps=4, num_stages=3, spilled_bytes=8)
        found = candidates("forward", own, dtype=torch.float16, pad=64, tma=False)
        assert [shape_of(tile) for tile in found].count((64, 64, 4, 3)) == 1


class TestChoice:
    """On kernels that are stood in for: any mixture of times and faults."""

    @given(
        st.lists(
            st.tuples(
                st.sampled_from([1.0, 2.0, 3.0]),
                st.sampled_from(["right", "nan", "half written", "off", "does not fit", "pass"]),
            ),
            min_size=len(TILES) - 1,
            max_size=len(TILES) - 1,
        ),
        st.sampled_from([1.0, 2.0, 3.0]),
    )
    def test_fastest_of_those_that_are_right(
        self, others: list[tuple[float, str]], own: float
    ) -> None:
        told = [(own, "right"), *others]
        what = {shape_of(tile): told[i] for i, tile in enumerate(TILES)}

        def launch(one: Launch) -> None:
            behaviour = what[shape_of(one)][1]
            if behaviour == "does not fit":
                raise OutOfResources(2, 1, "shared memory")
            if behaviour == "pass":
                raise RuntimeError("PassManager::run failed")
            if behaviour != "nan":
                fill(one)
            if behaviour == "half written":
                one.arguments["o_ptr"][..., 1:] = float("nan")
            if behaviour == "off":
                one.arguments["o_ptr"][..., 1:] = 1.05

        def clock(work: Any) -> float:
            return what[shape_of(work.args[0])][0]

        tuner = Tuner(Path("/proc/none/tiles.json"), clock, launch)
        with pytest.warns(RuntimeWarning, match="measured but not kept"):
            chosen = ask(tuner)
        right = [tile for tile in TILES if what[shape_of(tile)][1] == "right"]
        assert chosen == min(right, key=lambda tile: what[shape_of(tile)][0])
        tuner.clock = no_clock
        assert ask(tuner) == chosen

    def test_a_fault_of_the_device_is_not_swallowed(self, path: Path) -> None:
        def launch(one: Launch) -> None:
            if shape_of(one) != shape_of(TABLE):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            fill(one)

        with pytest.raises(RuntimeError, match="illegal memory"):
            ask(Tuner(path, FakeClock(), launch))
        assert not path.exists()

    @pytest.mark.parametrize("fault", ["no memory", "infinite"])
    def test_nothing_to_compare_with_leaves_the_table(self, path: Path, fault: str) -> None:
        def launch(one: Launch) -> None:
            if fault == "no memory":
                raise torch.OutOfMemoryError
            fill(one)
            one.arguments["o_ptr"][..., 0] = float("inf")

        with pytest.warns(RuntimeWarning, match="no tile of forward could be measured"):
            assert ask(Tuner(path, no_clock, launch)) == TABLE
        assert not path.exists()

    def test_progress_goes_to_stderr(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        ask(Tuner(path, FakeClock(), fill))
        out, err = capsys.readouterr()
        assert "tuning forward" in err
        assert out == ""

    def test_interpreters_time_is_never_taken(self, path: Path) -> None:
        made = {"o": torch.empty(1, 1, 2, 16)}

        def plan(made: Any, tile: Tile) -> Launch:
            raise AssertionError("planned")

        assert Tuner(path).tile("forward", TABLE, made, plan) is TABLE


class TestFile:
    """Outlives the process, several of which may write it."""

    def test_second_instance_reads_and_does_not_time(self, path: Path) -> None:
        clock = FakeClock(lambda launch: shape_of(launch) == (64, 128, 4, 2))
        chosen = ask(Tuner(path, clock, fill))
        assert shape_of(chosen) == (64, 128, 4, 2)
        assert len(clock.timed) == len(TILES)
        assert ask(Tuner(path, no_clock, fill)) == chosen
        assert [file.name for file in path.parent.iterdir()] == ["tiles.json"]

    def test_what_time_depends_on_is_measured_apart(self, path: Path) -> None:
        tuner = Tuner(path, clock := FakeClock(), fill)
        kinds: list[dict[str, Any]]
        kinds = [{"length": 33}, {"length": 65}, {"causal": False}, {"head_dim": 17}]
        again: list[dict[str, Any]]
        again = [{"length": 64}, {"length": 128}, {"head_dim": 9}, {"head_dim": 32}]
        for number, kind in enumerate(kinds, 1):
            ask(tuner, **kind)
            assert len(clock.timed) == number * len(TILES)
        for same in again:
            ask(tuner, **same)
        assert len(clock.timed) == len(kinds) * len(TILES)
        assert len(tile_cache.read(path)) == len(kinds)

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"\xff", b"[]", b"3", b'{"schema": 1}', b'{"schema":1,"tiles":3}']
    )
    def test_damaged_is_ignored_and_rewritten(self, path: Path, content: bytes) -> None:
        path.parent.mkdir()
        path.write_bytes(content)
        with pytest.warns(RuntimeWarning, match="tiles.json is ignored") as caught:
            chosen = ask(Tuner(path, clock := FakeClock(), fill))
        assert len(caught) == 1
        assert clock.timed
        assert list(tile_cache.read(path).values()) == [asdict(chosen)]

    def test_other_schema_is_not_read(self, path: Path) -> None:
        ask(Tuner(path, FakeClock(), fill))
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"schema": tile_cache.SCHEMA + 1}))
        ask(Tuner(path, clock := FakeClock(), fill))
        assert clock.timed
        assert json.loads(path.read_text()) == content

    @pytest.mark.parametrize("entry", [None, 3, {}, asdict(TABLE) | {"block_m": 96}])
    def test_tile_that_is_no_candidate_is_measured_anew(self, path: Path, entry: object) -> None:
        ask(Tuner(path, FakeClock(), fill))
        (key,) = tile_cache.read(path)
        tile_cache.merge(path, {key: entry})
        assert ask(Tuner(path, clock := FakeClock(), fill)) == TABLE
        assert clock.timed
        assert tile_cache.read(path) == {key: asdict(TABLE)}

    def test_what_another_process_wrote_meanwhile_stays(self, path: Path) -> None:
        mine, other = Tuner(path, FakeClock(), fill), Tuner(path, FakeClock(), fill)
        ask(mine, length=1)
        ask(other, length=2)
        ask(mine, length=4)
        ask(other, length=8)
        assert len(tile_cache.read(path)) == 4
        mine.clock = no_clock
        ask(mine, length=2)

    def test_merges_at_once_lose_nothing(self, path: Path) -> None:
        start = threading.Barrier(16)

        def write(number: int) -> None:
            start.wait()
            tile_cache.merge(path, {f"key {number}": number})

        threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert tile_cache.read(path) == {f"key {number}": number for number in range(16)}

    def test_failed_write_leaves_the_old_file(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tile_cache.merge(path, {"old": 1})

        def full(handle: int) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.warns(RuntimeWarning, match="not kept: No space left"):
            ask(Tuner(path, FakeClock(), fill))
        assert tile_cache.read(path) == {"old": 1}
        assert [file.name for file in path.parent.iterdir()] == ["tiles.json"]

    @pytest.mark.parametrize(("base", "folder"), [("/x/y", "/x/y"), ("", "/home/me/.cache")])
    def test_place(self, base: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/me")
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert tile_cache.cache_path() == Path(folder, "cs336_systems", "tiles.json")


class TestOff:
    """The table decides."""

    @pytest.mark.parametrize("value", [None, "", "0"])
    def test_by_default_nothing_is_timed(
        self, value: str | None, monkeypatch: pytest.MonkeyPatch, launched: list[Launch]
    ) -> None:
        monkeypatch.delenv(autotune.VARIABLE, raising=False)
        if value is not None:
            monkeypatch.setenv(autotune.VARIABLE, value)
        monkeypatch.setattr(autotune, "do_bench", no_clock)
        monkeypatch.setattr(autotune, "_tuner", lambda: pytest.fail("asked for a tuner"))
        for deterministic in (False, True):
            run(flash_attention_triton, deterministic=deterministic)
        assert tiled(launched) == table_tiles()

    def test_another_value_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(autotune.VARIABLE, "maybe")
        with pytest.raises(UsageError, match="attention: CS336_AUTOTUNE must be 0 or 1, got 'may"):
            autotune.tuner()

    def test_one_tuner_with_the_users_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(autotune.VARIABLE, "1")
        tuner = autotune.tuner()
        assert tuner is not None
        assert tuner is autotune.tuner()
        assert tuner.clock is autotune.gpu_ms


@pytest.mark.parametrize("deterministic", [False, True])
class TestKernels:
    """The real ones, forward and each backward, from the caller's side."""

    def test_tuning_that_keeps_the_table_changes_no_bit(
        self, deterministic: bool, path: Path, monkeypatch: pytest.MonkeyPatch, no_plans: None
    ) -> None:
        monkeypatch.delenv(autotune.VARIABLE, raising=False)
        untuned = run(flash_attention_triton, deterministic=deterministic)
        triton_run._REPLAYS.clear()
        switch_on(monkeypatch, Tuner(path, clock := FakeClock()))
        first = run(flash_attention_triton, deterministic=deterministic)
        second = run(flash_attention_triton, deterministic=deterministic)
        assert len(set(clock.timed)) > 10
        # A GPU adds up the one-pass kernel's dQ in any order.
        ordered = range(4) if deterministic or not ON_GPU else (0, 2, 3)
        for i in ordered:
            assert torch.equal(first[i], untuned[i])
            assert torch.equal(second[i], untuned[i])
        torch.testing.assert_close(first, untuned)
        torch.testing.assert_close(second, untuned)

    def test_other_tiles_are_launched_and_right(
        self,
        deterministic: bool,
        path: Path,
        monkeypatch: pytest.MonkeyPatch,
        launched: list[Launch],
    ) -> None:
        """The last tile of each list is the fastest, but for the forward's, which is wrong."""
        wanted = {"forward": (128, 64, 8, 2), "queries": (128, 64, 8, 2)}
        wanted |= {"one_pass": (128, 128, 8, 2), "keys": (64, 128, 8, 2)}
        wrong = (128, 128, 8, 3)
        skipped: list[Launch] = []
        original = Launch.run

        def launch(one: Launch) -> Any:
            if one.kernel is forward_kernel and shape_of(one) == wrong:
                skipped.append(one)
                return None
            return original(one)

        def fast(one: Launch) -> bool:
            return shape_of(one) in (wanted[str(kernel_of(one))], wrong)

        switch_on(monkeypatch, Tuner(path, clock := FakeClock(fast), launch))
        got = run(flash_attention_triton, deterministic=deterministic)
        assert skipped
        assert wrong not in clock.timed
        kernels = ["forward", "keys", "queries"] if deterministic else ["forward", "one_pass"]
        assert tiled(launched) == {name: wanted[name] for name in kernels}
        q, k, v, do = make()
        exact = reference_gradients(q, k, v, do, is_causal=True)
        plain = run(scaled_dot_prod_attention)
        magnitudes = term_magnitudes(q, k, v, do, scale=None, rounded_scores=True)
        assert_within_budget(got, plain, [exact.o, exact.dq, exact.dk, exact.dv], magnitudes)
        again = run(flash_attention_triton, deterministic=deterministic)
        torch.testing.assert_close(again, got)
