"""Is the language model the Transformer it claims to be: trained, compiled and loaded too?"""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cs336_basics.model import (
    BasicsTransformerLM,
    CausalMultiHeadSelfAttention,
    RotaryEmbedding,
    TransformerBlock,
)
from cs336_basics.nn_utils import clip_gradient, cross_entropy
from cs336_basics.optimizer import AdamW
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
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


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


# --- block and model --------------------------------------------------------------------------


def test_a_block_normalises_before_each_sublayer() -> None:
    block = TransformerBlock(12, 3, 20, RotaryEmbedding(16, 4), dtype=torch.float64)
    for norm in (block.ln1, block.ln2):
        nn.init.normal_(norm.weight)
    x, positions = normal(2, 5, 12), torch.tensor([[4, 3, 2, 1, 0]])
    middle = x + block.attn(F.rms_norm(x, (12,), block.ln1.weight, 1e-5), positions)
    expected = middle + block.ffn(F.rms_norm(middle, (12,), block.ln2.weight, 1e-5))
    assert_close(block(x, positions), expected)


def test_logits_are_the_blocks_between_embedding_and_head() -> None:
    model = tiny_model(dtype=torch.float64)
    x = model.token_embeddings.weight[tokens(2, 8)]
    for layer in model.layers:
        x = layer(x)
    x = F.rms_norm(x, (12,), model.ln_final.weight, 1e-5)
    assert_close(model(tokens(2, 8)), x @ model.lm_head.weight.T)


def test_state_dict_keys_and_shapes_are_the_contract() -> None:
    per_layer = {
        "attn.q_proj.weight": (12, 12),
        "attn.k_proj.weight": (12, 12),
        "attn.v_proj.weight": (12, 12),
        "attn.output_proj.weight": (12, 12),
        "ffn.w1.weight": (20, 12),
        "ffn.w2.weight": (12, 20),
        "ffn.w3.weight": (20, 12),
        "ln1.weight": (12,),
        "ln2.weight": (12,),
    }
    expected = {
        f"layers.{i}.{name}": shape
        for i, (name, shape) in itertools.product(range(2), per_layer.items())
    }
    expected |= {"token_embeddings.weight": (11, 12), "lm_head.weight": (11, 12)}
    expected |= {"ln_final.weight": (12,)}
    model = tiny_model()
    assert {k: tuple(w.shape) for k, w in model.state_dict().items()} == expected
    assert model.lm_head.weight is not model.token_embeddings.weight


def test_counts_of_parameters() -> None:
    block = 4 * 12 * 12 + 3 * 12 * 20 + 2 * 12
    model = tiny_model()
    assert model.get_num_params() == 2 * block + 12 + 11 * 12
    assert model.get_num_params(non_embedding=False) == 2 * block + 12 + 2 * 11 * 12


@settings(deadline=None, max_examples=20)
@given(first_changed=st.integers(1, 7), seed=SEEDS)
def test_the_future_does_not_change_the_past(first_changed: int, seed: int) -> None:
    model = tiny_model()
    before = tokens(2, 8, seed=seed)
    after = before.clone()
    after[:, first_changed:] = (after[:, first_changed:] + 1) % 11
    ours, theirs = model(before), model(after)
    assert torch.equal(ours[:, :first_changed], theirs[:, :first_changed])
    assert (ours[:, first_changed] != theirs[:, first_changed]).any()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 9, dtype=torch.int64), r"seq at most context_length 8, got \(1, 9\)"),
        (torch.tensor(1), r"seq at most context_length 8, got \(\)"),
        (torch.zeros(1, 3), "token ids must be integers, got torch.float32"),
        (torch.tensor([[0, 11]]), r"token ids must be in \[0, 11\), got 11"),
        (torch.tensor([[0, -1]]), r"token ids must be in \[0, 11\), got -1"),
    ],
)
def test_bad_tokens_are_named(ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model()(ids)


def test_a_model_made_on_the_meta_device_can_be_initialised_later() -> None:
    model = tiny_model(device="meta", dtype=torch.bfloat16)
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    assert model(tokens(1, 3).to("meta")).shape == (1, 3, 11)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.reset_parameters()
    expected = tiny_model(dtype=torch.bfloat16)
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, expected.state_dict()[key])
    assert torch.equal(model(tokens(1, 3)), expected(tokens(1, 3)))


def test_a_fake_model_runs_without_reading_its_tokens() -> None:
    with FakeTensorMode():
        logits = tiny_model()(torch.zeros(2, 5, dtype=torch.int64))
        loss = cross_entropy(logits, torch.zeros(2, 5, dtype=torch.int64))
    assert logits.shape == (2, 5, 11)
    assert loss.shape == ()


# --- training, autocast, compilation ----------------------------------------------------------


def torch_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    assert q.dtype == k.dtype == v.dtype
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def train_step(model: Callable[..., Tensor], parameters: list[nn.Parameter]) -> float:
    optimizer = AdamW(parameters, lr=1e-2)
    batch = tokens(2, 9)
    loss = cross_entropy(model(batch[:, :-1]), batch[:, 1:])
    loss.backward()
    clip_gradient(parameters, 1.0)
    optimizer.step()
    return loss.item()


def test_a_model_learns_its_batch() -> None:
    model = tiny_model()
    optimizer = AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    batch = tokens(4, 9)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = cross_entropy(model(batch[:, :-1]), batch[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Random tokens cost log(vocab) to guess; a batch learned by heart costs next to nothing.
    assert losses[0] > 0.8 * math.log(11)
    assert losses[-1] < 0.1 * math.log(11)


def test_autocast_computes_in_bf16_and_keeps_fp32_gradients() -> None:
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens(2, 8))
        loss = cross_entropy(logits, tokens(2, 8, seed=1))
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()
    exact = copy.deepcopy(model).double()(tokens(2, 8))
    all_bf16 = copy.deepcopy(model).to(torch.bfloat16)(tokens(2, 8))
    assert all_bf16.dtype == torch.bfloat16
    # fp32 weights and an fp32 residual stream can only help.
    assert (logits - exact).abs().mean() <= (all_bf16 - exact).abs().mean()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_training_step_compiles_as_one_graph(backend: str, autocast: bool) -> None:
    torch.compiler.reset()
    eager, compiled_from = tiny_model(), tiny_model()
    compiled = torch.compile(compiled_from, fullgraph=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = train_step(eager, list(eager.parameters()))
        loss = train_step(compiled, list(compiled_from.parameters()))
    assert_close(torch.tensor(loss), torch.tensor(expected))
    for ours, theirs in zip(compiled_from.parameters(), eager.parameters(), strict=True):
        assert_close(ours, theirs)


def test_the_loss_and_explicit_positions_compile_as_one_graph() -> None:
    torch.compiler.reset()
    layer = CausalMultiHeadSelfAttention(12, 3, RotaryEmbedding(16, 4), dtype=torch.float64)
    layer.attention_fn = torch_attention

    def loss(x: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(layer(x, positions), targets)

    arguments = (normal(2, 5, 12), tokens(2, 5), tokens(2, 5, seed=1))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*arguments), loss(*arguments))


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))),
    reason="torch.compile needs a C++ compiler on PATH to generate code for the CPU",
)
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_one_layer_compiles_to_native_code() -> None:
    torch.compiler.reset()
    model = tiny_model(num_layers=1)
    with torch.no_grad():
        logits = torch.compile(model, fullgraph=True)(tokens(2, 8))
    assert_close(logits, model(tokens(2, 8)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_step_on_the_gpu_never_makes_the_host_wait() -> None:
    model = tiny_model(device="cuda")
    assert all(t.is_cuda for t in [*model.parameters(), *model.buffers()])
    batch = tokens(2, 9).cuda()
    optimizer = AdamW(model.parameters())
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = cross_entropy(model(batch[:, :-1]), batch[:, 1:])
        loss.backward()
        clip_gradient(model.parameters(), 1.0)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(loss.item())


# --- loading ----------------------------------------------------------------------------------


def save(model: BasicsTransformerLM, folder: Path, prefix: str = "", **config: Any) -> None:
    (folder / "model_config.json").write_text(json.dumps({**model.config, **config}))
    weights = {prefix + key: weight for key, weight in model.state_dict().items()}
    torch.save(weights, folder / "model.pt")


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_saved_model_gives_the_same_logits(tmp_path: Path, prefix: str, as_text: bool) -> None:
    model = tiny_model()
    assert model.config == TINY
    save(model, tmp_path, prefix)
    loaded = BasicsTransformerLM.from_pretrained(str(tmp_path) if as_text else tmp_path)
    assert loaded.config == TINY
    assert torch.equal(loaded(tokens(2, 8)), model(tokens(2, 8)))


def test_blocks_compiled_one_by_one_load_too(tmp_path: Path) -> None:
    model = tiny_model()
    expected = model(tokens(2, 8))
    for i, layer in enumerate(model.layers):
        model.layers[i] = torch.compile(layer, backend="eager")  # type: ignore[assignment]
    assert any(".0._orig_mod." in key for key in model.state_dict())
    save(model, tmp_path)
    assert torch.equal(BasicsTransformerLM.from_pretrained(tmp_path)(tokens(2, 8)), expected)


@pytest.mark.parametrize("missing", ["model_config.json", "model.pt"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    save(tiny_model(), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"from_pretrained: {missing} must be in"):
        BasicsTransformerLM.from_pretrained(tmp_path)


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tiny_model(), tmp_path, num_experts=4)
    with pytest.raises(ValueError, match=r"model_config.json must hold .*'num_experts'"):
        BasicsTransformerLM.from_pretrained(tmp_path)
    (tmp_path / "model_config.json").write_text('{"vocab_size": 11}')
    with pytest.raises(ValueError, match=r"model_config.json must hold .*'context_length'"):
        BasicsTransformerLM.from_pretrained(tmp_path)
