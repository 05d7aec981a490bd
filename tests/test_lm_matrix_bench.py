"""The benchmarks behind the experiments: what they run, what they read, what they hold to fp64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from attention_bench import AttentionBench, last_rows
from bench_lm_matrix import run_metrics, step_memory, sweep
from data_parallel_ranks import Losses, Phase, TrainingResult
from data_parallel_rows import KINDS
from hypothesis import example, given
from hypothesis import strategies as st
from lm_matrix_cases import chosen_matrix, default_matrix
from model_size import model_config, override, size_name
from sweep_cases import Pair, chosen_sweep, default_sweep, every_pair
from token_batches import TokenFiles, check_tokens

from cs336_systems.accounting import attention_bytes, attention_flops
from cs336_systems.attention.reference import reference_gradients
from cs336_systems.config import PRESETS, ModelConfig, preset
from cs336_systems.errors import UsageError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def matrix(device: torch.device = CPU, **options: str) -> Any:
    return chosen_matrix(options.get, device, smoke=False)


# --- model sizes ---


@given(
    heads=st.integers(1, 64),
    width=st.integers(1, 64),
    others=st.tuples(*[st.integers(1, 10**6)] * 3),
    context=st.integers(1, 4096),
)
@example(heads=4, width=16, others=(512, 2, 1024), context=9)  # tiny, which has a name
def test_a_size_is_its_name(heads: int, width: int, others: tuple[int, ...], context: int) -> None:
    d_ff, num_layers, vocab_size = others
    config = ModelConfig(
        d_model=heads * width * 2,
        d_ff=d_ff,
        num_layers=num_layers,
        num_heads=heads,
        vocab_size=vocab_size,
        context_length=context,
    )
    name = size_name(config)
    assert model_config(name, context) == config
    assert (name in PRESETS) == (name == "tiny")


def test_presets_keep_their_names() -> None:
    assert [size_name(preset(name)) for name in PRESETS] == list(PRESETS)
    with pytest.raises(UsageError, match=r"preset must be one of debug, .* got 'L2 H4'"):
        model_config("L2 H4", 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers=3", "--lm-model must be one of num_layers=N, .*, got 'layers=3'"),
        ("d_ff=x", "--lm-model d_ff must list integers of at least 1, got 'x'"),
        (",", "--lm-model must name at least one field, got ','"),
        ("num_heads=3", "num_heads must divide d_model"),
    ],
)
def test_wrong_sizes_are_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        override("--lm-model", text, preset("tiny"))


# --- the matrix ---


def test_matrix_is_the_seeds_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cases = default_matrix(GPU, smoke=False).cases()
    assert len(cases) == 12
    assert {case.size for case in cases} == {"L24 H16 D512 F4096 V10000"}
    assert {(case.strategy == "none", case.ranks) for case in cases} == {(True, 1), (False, 2)}
    # Ranks are started once for each number of them.
    numbers = [case.ranks for case in cases]
    assert numbers == sorted(numbers, reverse=True)


def test_an_epoch_is_the_same_tokens_on_any_ranks() -> None:
    chosen = matrix(lm_epoch_steps="5", ranks="2", strategies="none,naive")
    many, alone = chosen.cases()[0], chosen.cases()[-1]
    assert (many.ranks, alone.ranks) == (2, 1)
    assert (chosen.steps(many), chosen.steps(alone)) == (3, 5)
    result = TrainingResult(
        seconds=[0.5, 0.7, 0.6],
        loss=1.0,
        phases={"after_step": Phase(peak_bytes=None, held=dict.fromkeys(KINDS, 1))},
        step_peak_bytes=None,
        log=[],
        timeline=None,
        losses=Losses(first=3.0, last=2.0, validation=None),
    )
    found = [run_metrics(chosen, case, [result]) for case in (many, alone)]
    assert [each["epoch_s"] for each in found] == pytest.approx([0.6 * 2.5, 0.6 * 5])
    assert found[0]["first_loss"] == 3.0
    assert "validation_loss" not in found[0]
    assert "5 steps of one rank" in chosen.said(many)


def test_memory_is_of_the_rank_that_needs_most() -> None:
    def rank(peak: int | None, state: int) -> TrainingResult:
        held = dict(zip(KINDS, (10, 10, state, 4, None), strict=True))
        phases = {"after_step": Phase(peak_bytes=peak, held=held)}
        common: dict[str, Any] = {"seconds": [1.0], "loss": 1.0, "log": [], "timeline": None}
        return TrainingResult(phases=phases, step_peak_bytes=peak, **common)

    on_gpu = step_memory([rank(100, 20), rank(90, 30)])
    assert on_gpu["memory_bytes"] == on_gpu["peak_bytes"] == 100
    assert on_gpu["memory_activations_bytes"] == 100 - 44
    on_cpu = step_memory([rank(None, 20), rank(None, 30)])
    assert on_cpu["memory_bytes"] == 54
    assert "peak_bytes" not in on_cpu
    assert "memory_activations_bytes" not in on_cpu


def test_options_choose_runs() -> None:
    chosen = matrix(
        rows="sdpa", strategies="none,flat", ranks="3", lm_model="d_ff=96,vocab_size=500",
        contexts="16", rank_batch="5", precisions="tf32,bf16",
    )  # fmt: skip
    names, cases = sweep(SimpleNamespace(matrix=chosen))  # type: ignore[arg-type]
    assert names == "attention, strategy, size, context, batch, ranks, precision"
    assert cases == [
        ("sdpa", "flat", "L2 H4 D128 F96 V500", 16, 5, 3, "bf16"),
        ("sdpa", "none", "L2 H4 D128 F96 V500", 16, 5, 1, "bf16"),
    ]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("rows", "--rows must be one of scaled_dot_prod_attention, "),
        ("strategies", "--strategies must be one of none, naive, "),
        ("lm_epochs", "--lm-epochs must list integers of at least 1, got 'x'"),
        ("lm_epoch_steps", "--lm-epoch-steps must list integers of at least 1, got 'x'"),
    ],
)
def test_wrong_choices_are_one_line(option: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        matrix(**{option: "x"})
    assert str(error.value).startswith(f"benchmarks: {message}")


# --- token files ---


def save(path: Path, tokens: Any) -> str:
    np.save(path, tokens)
    return str(path)


def test_batches_are_windows_of_the_file_and_differ_by_rank(tmp_path: Path) -> None:
    config = preset("debug", vocab_size=1000, context_length=8)
    path = save(tmp_path / "train.npy", np.arange(1000, dtype=np.uint16))
    files = TokenFiles(train_path=path, val_path=path)
    batches = [files.training_batches(config, 4, rank, CPU) for rank in (0, 0, 1)]
    drawn = [[next(each) for _ in range(3)] for each in batches]
    for tokens, targets in drawn[0]:
        assert torch.equal(tokens + 1, targets)
        assert torch.equal(tokens - tokens[:, :1], torch.arange(8).expand(4, 8))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][0][0], drawn[2][0][0])
    assert not torch.equal(drawn[0][0][0], drawn[0][1][0])
    assert len(files.validation_batches(config, 4, CPU)) == 4
    assert TokenFiles().validation_batches(config, 4, CPU) == []
    random, _ = next(TokenFiles().training_batches(config, 4, 0, CPU))
    assert 0 <= random.min() < random.max() < config.vocab_size


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.arange(8, dtype=np.uint16), "hold at least context_length [+] 1 = 17 tokens, got 8"),
        (np.zeros((4, 40), dtype=np.uint16), "be a .npy file of one row of integers"),
        (np.zeros(40), "be a .npy file of one row of integers"),
        (np.full(40, 128), "hold ids below the vocabulary's 128, got 128"),
        (np.full(40, -1), "hold ids below the vocabulary's 128, got -1"),
        (np.array([None] * 40), "be a .npy file of token ids"),
    ],
)
def test_wrong_token_files_are_one_line(tmp_path: Path, tokens: Any, message: str) -> None:
    config = preset("debug", context_length=16)
    with pytest.raises(UsageError, match=message) as error:
        check_tokens("--train-path", save(tmp_path / "x.npy", tokens), config)
    assert "\n" not in str(error.value)


def test_missing_and_damaged_token_files_are_one_line(tmp_path: Path) -> None:
    config = preset("debug", context_length=16)
    with pytest.raises(UsageError, match=r"--val-path: .*none\.npy cannot be read: No such file"):
        check_tokens("--val-path", str(tmp_path / "none.npy"), config)
    for content in (b"", b"\x93NUMPY", b"text"):
        (tmp_path / "x.npy").write_bytes(content)
        with pytest.raises(UsageError, match=r"--val-path must be a \.npy file of token ids"):
            check_tokens("--val-path", str(tmp_path / "x.npy"), config)


def test_an_epoch_is_at_most_one_pass_over_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "train.npy", np.zeros(600, dtype=np.uint16))
    short = matrix(train_path=path, rank_batch="4", contexts="64")
    assert (short.epoch_steps, short.num_tokens) == (2, 600)
    assert "train.npy (600 tokens); an epoch is 512 tokens" in short.said(short.cases()[0])
    assert str(tmp_path) not in short.said(short.cases()[0])


# --- the sweep ---


def test_every_length_of_queries_meets_every_one_of_keys() -> None:
    pairs = default_sweep(GPU, smoke=False).pairs
    assert len(set(pairs)) == 25
    assert [pair.tier for pair in pairs] == sorted(pair.tier for pair in pairs)
    assert every_pair((8, 4)) == (Pair(4, 4), Pair(4, 8), Pair(8, 4), Pair(8, 8))
    words = [pair.ratio for pair in (Pair(4, 4), Pair(8, 2), Pair(2, 8), Pair(6, 4))]
    assert words == ["N_q = N_k", "N_q = 4 N_k", "N_k = 4 N_q", "N_q : N_k = 3 : 2"]


@pytest.mark.parametrize("word", ["128", "128:", "0:4", "a:4", "1:2:3"])
def test_wrong_pairs_are_one_line(word: str) -> None:
    given = {"tiers": word}
    with pytest.raises(UsageError, match="benchmarks: --tiers must list QUERIES:KEYS"):
        chosen_sweep(given.get, CPU, smoke=False)


def test_speed_up_is_against_the_plain_kernel_or_the_first() -> None:
    for rows, baseline in (("sdpa,scaled_dot_prod_attention", "scaled_dot_prod_attention"),
                           ("sdpa,vectorized_torch", "sdpa")):  # fmt: skip
        given = {"rows": rows, "sweep_causal": False}
        assert chosen_sweep(given.get, CPU, smoke=False).baseline == baseline


@given(queries=st.integers(1, 40), keys=st.integers(1, 40), is_causal=st.booleans())
@example(queries=3, keys=40, is_causal=True)
@example(queries=40, keys=3, is_causal=True)
def test_flops_and_bytes_count_the_scores_and_the_rows(
    queries: int, keys: int, is_causal: bool
) -> None:
    seen = torch.ones(queries, keys).tril() if is_causal else torch.ones(queries, keys)
    scores = seen.sum().item()
    if is_causal:  # The diagonal's scores count half, as the square formula has it.
        scores -= min(queries, keys) / 2
    flops = attention_flops(2, 3, queries, 8, "forward", is_causal=is_causal, num_keys=keys)
    assert flops == pytest.approx(4 * 2 * 3 * 8 * scores)
    moved = attention_bytes(2, 3, queries, 8, "forward", element_bytes=2, num_keys=keys)
    assert moved == 2 * 3 * 8 * 2 * (2 * queries + 2 * keys)


@given(
    queries=st.integers(1, 90),
    keys=st.integers(1, 90),
    is_causal=st.booleans(),
    seed=st.integers(0, 99),
)
@example(queries=90, keys=3, is_causal=True, seed=0)
@example(queries=3, keys=90, is_causal=True, seed=0)
def test_the_checked_rows_are_the_references(
    queries: int, keys: int, is_causal: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    q, k, v, grad = (
        torch.randn(rows, 4, dtype=torch.float64) for rows in (queries, keys, keys, queries)
    )
    exact = reference_gradients(q, k, v, grad, is_causal=is_causal)
    rows = last_rows(q, k, v, grad, is_causal)
    for got, truth in zip(rows, (exact.o, exact.dq, exact.dk, exact.dv), strict=False):
        assert torch.allclose(got, truth[-len(got) :], rtol=1e-10, atol=1e-12)
    assert len(rows) in (2, 4)
    assert (len(rows) == 4) == (queries <= 64 or (is_causal and queries == keys))


@pytest.mark.parametrize("sizes", [(80, 16), (16, 80)])
def test_a_wrong_result_on_unequal_lengths_is_found(sizes: tuple[int, int]) -> None:
    queries, num_keys = sizes

    def bench(error: float) -> AttentionBench:
        def run(q: Any, k: Any, v: Any, *, is_causal: bool) -> Any:
            assert (q.shape[-2], k.shape[-2], v.shape[-2]) == (queries, num_keys, num_keys)
            o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
            return o + error

        size = (1, 2, queries, 8)
        return AttentionBench(run, size, torch.float32, CPU, is_causal=False, num_keys=num_keys)

    right = bench(0.0).workload("forward").check
    wrong = bench(1e-4).workload("forward").check
    assert right is not None
    assert wrong is not None
    right()
    with pytest.raises(AssertionError, match="o: max error"):
        wrong()
