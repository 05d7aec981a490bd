"""Text by the model that is being trained, whatever it is wrapped in."""

from __future__ import annotations

import torch
from cs336_basics.sampling import sample_next

from cs336_systems.parallel.base import DataParallel
from cs336_systems.train.config import PipelineConfig
from cs336_systems.train.evaluate import evaluating
from cs336_systems.train.step import autocast
from cs336_systems.train.tokenizer import BpeTokenizer


@torch.no_grad()
def sample_text(
    model: DataParallel,
    tokenizer: BpeTokenizer,
    config: PipelineConfig,
    *,
    context_length: int,
    num_tokens: int,
) -> str:
    """Return the config's prompt and what the model makes of it, up to the document's end.

    Every rank runs as many forward passes, since those of a sharded model communicate: a document
    that ends early is cut afterwards.
    Cost: `num_tokens` forward passes over the whole text so far.
    """
    evaluation, device = config.evaluation, next(model.parameters()).device
    prompt = tokenizer.encode(evaluation.sample_prompt) or [tokenizer.end_of_text]
    generator = torch.Generator(device).manual_seed(config.training.seed)
    tokens = torch.tensor([prompt], device=device)
    # Compiled for training's shape; each length of a growing text would be compiled again.
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        for _ in range(num_tokens):
            with autocast(config.training, device):
                logits = model(tokens[:, -context_length:])[:, -1]
            drawn = sample_next(logits, evaluation.temperature, evaluation.top_k, generator)
            tokens = torch.cat([tokens, drawn[:, None]], dim=1)
    new = tokens[0, len(prompt) :].tolist()
    if tokenizer.end_of_text in new:
        new = new[: new.index(tokenizer.end_of_text)]
    return evaluation.sample_prompt + tokenizer.decode(new)
