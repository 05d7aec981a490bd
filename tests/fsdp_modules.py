"""Modules that FSDP meets in the wild, trained alone and on ranks; imports no pytest."""

from __future__ import annotations

from collections.abc import Callable

import adapters
import torch
import torch.distributed as dist
from cs336_basics.model import BasicsTransformerLM
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cs336_systems.parallel import wrap
from cs336_systems.parallel.collectives import record_collectives

WIDTH = 4


class Drops(nn.Module):
    """Runs other blocks, in another order, in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        order = [[0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [1, 1, 3], [0, 1, 2, 3, 4]][self.num_calls % 4]
        for index in order:
            x = x + self.blocks[index](x).tanh()
        return x


class Whole(nn.Module):
    """Recomputes all that is inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Drops()

    def forward(self, x: Tensor) -> Tensor:
        self.inside.num_calls = 2  # the recomputation's order is the first one's
        return checkpoint(self.inside, x, use_reentrant=False)


class Fused(nn.Module):
    """Uses weights of layers that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(WIDTH, WIDTH)})])
        self.blocks = nn.ModuleList([FusedBlock(), FusedBlock()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.layers[0]["q"](x)


class FusedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, self.up.weight).tanh()
        return nn.functional.linear(hidden, self.down.weight) + self.up(x).mean(-1, keepdim=True)


class Lookup(nn.Module):
    """An attention layer outside of any list, and an embedding inside of one."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(7, WIDTH, padding_idx=0)])
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.detach() * 3).long().remainder(7)[..., 0]
        x = x + self.tables[0](ids)
        return self.attention(x, x, x, need_weights=False)[0]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "attention": Lookup,
    "drops": Drops,
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, 2, 6, dropout=0.0, batch_first=True), 2
    ),
    "fused": Fused,
    "layer": lambda: nn.Linear(WIDTH, 3),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "convolution": lambda: nn.Sequential(nn.Conv1d(3, 2, 1), nn.Linear(WIDTH, 2)),
    "whole": Whole,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(7)
    return MODULES[name]().double()


def inputs(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(2, 3, WIDTH, generator=generator, dtype=torch.float64)


def train(name: str, world_size: int) -> dict[str, Tensor]:
    """Train a module alone on all ranks' data."""
    module = build(name)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)
    for step in range(5):
        optimizer.zero_grad()
        x = torch.cat([inputs(step, rank) for rank in range(world_size)])
        module(x).square().mean().backward()
        optimizer.step()
    return dict(module.state_dict())


def train_on_rank(name: str, ranks: list[list[int]] | None = None) -> dict[str, Tensor]:
    """Train a module on this rank's data, in the group it is in."""
    groups = [dist.new_group(members) for members in ranks or []]
    mine = [group for group in groups if dist.get_rank(group) >= 0]
    group = mine[0] if mine else None
    model = wrap(build(name), "fsdp", find_unused=True, group=group)
    optimizer = model.build_optimizer(torch.optim.SGD, lr=0.1, momentum=0.5)
    for step in range(5):
        optimizer.zero_grad()
        model(inputs(step, dist.get_rank(group))).square().mean().backward()
        model.finish_gradient_synchronization()
        optimizer.step()
    state = dict(model.full_state_dict())
    for other in mine:
        dist.destroy_process_group(other)
    return state


def use_the_course_hooks(
    dtype: torch.dtype | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], set[torch.dtype], int]:
    """Train as the course's tests do; return plain and sharded weights, dtypes of the optimizer's
    state and how many elements it has."""
    results = []
    for sharded in (False, True):
        torch.manual_seed(5)
        model: nn.Module = BasicsTransformerLM(17, 8, 8, 2, 2, 12)
        if sharded:
            model = adapters.get_fsdp(model, compute_dtype=dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for step in range(3):
            tokens = torch.randint(17, (4, 8), generator=torch.Generator().manual_seed(step))
            part = tokens.chunk(dist.get_world_size())[dist.get_rank()] if sharded else tokens
            optimizer.zero_grad()
            logits = model(part)
            logits.float().log_softmax(-1)[..., 0].mean().backward()
            if sharded:
                adapters.fsdp_on_after_backward(model, optimizer)
            optimizer.step()
        results.append(adapters.fsdp_gather_full_params(model) if sharded else model.state_dict())
    buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
    return (
        results[0],
        results[1],
        {buffer.dtype for buffer in buffers},
        sum(buffer.numel() for buffer in buffers),
    )


def num_recomputed(how_many: bool | int) -> int:
    """Return how many more matrix products a step has with recomputed blocks than without."""
    counts = []
    for option in (False, how_many):
        torch.manual_seed(5)
        model = wrap(BasicsTransformerLM(17, 8, 8, 4, 2, 12), "fsdp", checkpoint_blocks=option)
        with torch.profiler.profile() as profile, record_collectives():
            model(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
            model.finish_gradient_synchronization()
        counts.append(sum(event.name == "aten::silu" for event in profile.events()))
    return counts[1] - counts[0]
