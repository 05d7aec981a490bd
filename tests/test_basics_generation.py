"""Does generation draw what it should, stop where it should, and leave the model as it was?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cs336_basics.model import BasicsTransformerLM
from cs336_basics.sampling import sample_next
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

CONTEXT = 6
VOCAB = 9


def tiny_model() -> BasicsTransformerLM:
    torch.manual_seed(0)
    return BasicsTransformerLM(VOCAB, CONTEXT, 8, 1, 2, 16)


def scripted(model: BasicsTransformerLM, rows: list[list[int]]) -> list[Tensor]:
    """Make `model` prefer the given tokens, one column per call; returns what it was shown."""
    seen: list[Tensor] = []

    def forward(token_ids: Tensor) -> Tensor:
        wanted = torch.tensor([row[len(seen)] for row in rows])
        seen.append(token_ids.clone())
        logits = torch.nn.functional.one_hot(wanted, VOCAB).float()
        return logits.unsqueeze(1).expand(-1, token_ids.shape[-1], -1)

    model.forward = forward  # type: ignore[method-assign]
    return seen


# --- one draw ---------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    vocab=st.integers(1, 12),
    top_k=st.integers(1, 15),
    distinct=st.integers(1, 12),
    temperature=st.sampled_from([1e-300, 1e-3, 1.0, 1e3, 1e300]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**32 - 1),
)
@example(vocab=12, top_k=4, distinct=1, temperature=1e300, dtype=torch.float32, seed=0)  # all tied
def test_only_the_top_k_are_ever_drawn(
    vocab: int, top_k: int, distinct: int, temperature: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that ties are common.
    logits = torch.randint(distinct, (vocab,), generator=generator).to(dtype)
    by_rank = sorted(range(vocab), key=lambda token: (-logits[token].item(), token))
    candidates = set(by_rank[:top_k])
    draws = sample_next(logits.expand(300, -1), temperature, top_k, generator)
    assert set(draws.tolist()) <= candidates
    if temperature >= 1e3:  # nearly uniform: a candidate missed 300 times out of 12 would be odd
        assert set(draws.tolist()) == candidates


def test_draws_follow_the_tempered_distribution() -> None:
    logits, temperature, num_draws = torch.tensor([0.0, 1.0, 2.0, -1.0]), 0.7, 20_000
    generator = torch.Generator().manual_seed(0)
    draws = sample_next(logits.expand(num_draws, -1), temperature, 3, generator)
    shares = torch.bincount(draws, minlength=4) / num_draws
    expected = torch.softmax(logits[:3] / temperature, 0)
    deviation = (expected * (1 - expected) / num_draws).sqrt()
    assert ((shares[:3] - expected).abs() < 5 * deviation).all()
    assert shares[3] == 0


def test_masked_logits_are_never_drawn() -> None:
    logits = torch.tensor([0.0, float("-inf"), 0.0]).expand(500, -1)
    draws = sample_next(logits, 1.0, None, torch.Generator().manual_seed(0))
    assert set(draws.tolist()) == {0, 2}


def test_temperature_zero_is_argmax_and_the_smallest_temperature_agrees() -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_next(logits, 0.0), logits.argmax(-1))
    assert torch.equal(sample_next(logits, 5e-324), logits.argmax(-1))


# --- whole continuations ----------------------------------------------------------------------


def test_greedy_generation_is_the_argmax_of_every_step() -> None:
    model = tiny_model()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    new = model.generate(prompt, 7, temperature=0)
    assert new.shape == (2, 7)
    assert new.dtype == torch.int64
    expected = prompt
    for _ in range(7):
        step = model(expected[:, -CONTEXT:])[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, step), dim=1)
    assert torch.equal(new, expected[:, 3:])
    assert torch.equal(model.generate(prompt, 7, temperature=0), new)


def test_top_one_is_greedy_and_a_seed_repeats_a_sample() -> None:
    model, prompt = tiny_model(), torch.tensor([1, 2])
    greedy = model.generate(prompt, 8, temperature=0)
    assert torch.equal(model.generate(prompt, 8, top_k=1), greedy)

    def sample(seed: int) -> list[int]:
        source = torch.Generator().manual_seed(seed)
        return model.generate(prompt, 20, top_k=100, generator=source)[0].tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_one_prompt_without_a_batch_is_a_batch_of_one() -> None:
    model = tiny_model()
    flat = model.generate(torch.tensor([1, 2], dtype=torch.int32), 3, temperature=0)
    assert flat.shape == (1, 3)
    assert torch.equal(flat, model.generate(torch.tensor([[1, 2]]), 3, temperature=0))


def test_only_the_last_context_is_shown() -> None:
    model = tiny_model()
    seen = scripted(model, [[7, 8, 7]])
    prompt = torch.arange(5)
    model.generate(prompt, 3, temperature=0)
    assert [window[0].tolist() for window in seen] == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 7],
        [1, 2, 3, 4, 7, 8],
    ]


def test_ended_rows_are_filled_up_until_all_have_ended() -> None:
    model = tiny_model()
    seen = scripted(model, [[1, 0, 3, 4, 5], [1, 2, 3, 0, 5]])
    new = model.generate(torch.tensor([[1], [1]]), 5, temperature=0, eos_token_id=0)
    assert new.tolist() == [[1, 0, 0, 0], [1, 2, 3, 0]]
    assert len(seen) == 4


def test_without_an_end_all_tokens_are_made() -> None:
    model = tiny_model()
    scripted(model, [[0, 0, 2]])
    assert model.generate(torch.tensor([1]), 3, temperature=0).tolist() == [[0, 0, 2]]
    scripted(model, [[3, 4, 2]])
    new = model.generate(torch.tensor([1]), 3, temperature=0, eos_token_id=0)
    assert new.tolist() == [[3, 4, 2]]


def test_no_new_tokens_is_an_empty_answer() -> None:
    assert tiny_model().generate(torch.tensor([[1], [2]]), 0).shape == (2, 0)


@pytest.mark.parametrize("training", [False, True])
def test_modes_are_given_back_even_after_an_error(training: bool) -> None:
    model = tiny_model().train(training)
    model.lm_head.train(not training)
    modes: list[bool] = []
    hook = model.lm_head.register_forward_hook(lambda module, *_: modes.append(module.training))
    new = model.generate(torch.tensor([1]), 2)
    hook.remove()
    assert not new.requires_grad
    assert modes == [False, False]
    model.ln_final.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate(torch.tensor([1]), 2)
    assert model.training is model.layers.training is training
    assert model.lm_head.training is not training


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1], {"temperature": -1.0}, "temperature must be finite and >= 0, got -1.0"),
        ([1], {"temperature": float("nan")}, "temperature must be finite and >= 0, got nan"),
        ([1], {"temperature": float("inf")}, "temperature must be finite and >= 0, got inf"),
        ([1], {"top_k": 0}, "top_k must be at least 1, got 0"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens must be >= 0, got -1"),
        ([], {}, r"x must be a non-empty \(seq,\) or \(batch, seq\), got \(0,\)"),
        ([[[1]]], {}, r"x must be a non-empty \(seq,\) or \(batch, seq\), got \(1, 1, 1\)"),
        ([1.5], {}, "x must be integers, got torch.float32"),
        ([1, VOCAB], {}, r"x must be in \[0, 9\), got 9"),
    ],
)
def test_bad_requests_are_named(prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"generate: {message}"):
        tiny_model().generate(torch.tensor(prompt), **{"max_new_tokens": 1, **options})
