"""Models for FSDP and their training, alone or on a rank; imports no pytest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from cs336_basics.layers import Embedding, Linear, RMSNorm
from cs336_basics.optimizer import AdamW
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cs336_systems.parallel import wrap
from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.collectives import communication_device

VOCABULARY = 11
FEATURES = (
    "bias",
    "bypassed",
    "checkpointed",
    "detached",
    "frozen_all",
    "frozen_some",
    "layer_by_layer",
    "lone_norm",
    "nested",
    "outside",
    "repeated",
    "side_output",
    "sometimes",
    "tied",
    "two_forwards",
    "unused",
    "zeroed",
)
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.125}),
    "momentum": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    # A large eps, lest the sign of a rounding error decide on a whole step.
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "eps": 1e-3}),
    "basics_adamw": (AdamW, {"lr": 1e-2, "eps": 1e-3}),
}


@dataclass(frozen=True)
class Case:
    """What is trained and how."""

    seed: int = 0
    width: int = 5
    hidden: int = 7
    depth: int = 3
    features: frozenset[str] = frozenset()
    optimizer: str = "sgd"
    num_micro_batches: int = 1
    num_samples: int = 2
    """Of a rank, in a micro-batch."""
    num_steps: int = 4
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)

    def has(self, feature: str) -> bool:
        return feature in self.features


class Block(nn.Module):
    """A residual perceptron, in lists of its own where the case asks for it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.norm = RMSNorm(case.width)
        up: nn.Module = Linear(case.width, case.hidden)
        if case.has("bias"):
            up = nn.Linear(case.width, case.hidden)
        down = nn.Linear(case.hidden, case.width, bias=case.has("bias"))
        self.inner = nn.ModuleList([up, nn.ModuleList([down])])
        self.side: Tensor | None = None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        up, (down,) = self.inner
        hidden = up(self.norm(x)).tanh()
        if self.case.has("side_output"):
            # Reaches the loss by another way than the block's output, and after it.
            self.side = down(hidden.sin()).square().mean((1, 2))
        return {"x": x + down(hidden)}


class Net(nn.Module):
    """Tokens to one number per sample, with whatever the case's features add."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.embedding = Embedding(VOCABULARY, case.width)
        blocks: list[nn.Module] = [Block(case) for _ in range(case.depth)]
        if case.has("nested"):
            blocks = [nn.ModuleList(blocks[:1]), nn.ModuleDict({"rest": nn.ModuleList(blocks[1:])})]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(case.width)
        self.head = nn.Linear(case.width, VOCABULARY, bias=case.has("bias"))
        if case.has("tied"):
            self.head.weight = self.embedding.weight
        if case.has("outside"):
            self.outside = nn.Sequential(nn.Linear(case.width, 3), nn.Linear(3, case.width))
        if case.has("unused"):
            self.unused = nn.Linear(2, 3)
        if case.has("sometimes"):
            self.sometimes = nn.Linear(case.width, case.width)
        if case.has("lone_norm"):
            self.scale = nn.Parameter(torch.rand(case.width))
        self._freeze()

    def _freeze(self) -> None:
        if self.case.has("frozen_some"):
            for block in self._blocks():
                block.inner[0].weight.requires_grad_(False)
        if self.case.has("frozen_all") and self.case.depth > 1:
            self._blocks()[1].requires_grad_(False)

    def _blocks(self) -> list[Block]:
        return [module for module in self.blocks.modules() if isinstance(module, Block)]

    def forward(self, tokens: Tensor, use: Tensor) -> Tensor:
        """Shapes: tokens (samples, seq), use () whether every part counts -> (samples,)."""
        x = self.embedding(tokens)
        for block in self._blocks():
            x = self._run_block(block, x)
            if block is self._blocks()[0]:
                early = x
                x = x.detach() if self.case.has("detached") and not use else x
        if self.case.has("repeated"):
            x = self._run_block(self._blocks()[0], x)
        if self.case.has("outside"):
            x = x + self.outside(x)
        if self.case.has("lone_norm"):
            x = x * self.scale
        if self.case.has("sometimes"):
            y = self.sometimes(x)
            x = x + y if use else x
        logits = self.head(self.norm(x.to(self.norm.weight.dtype)))
        losses = logits.square().mean((1, 2)) - logits[..., 0].mean(1)
        if self.case.has("bypassed") and not use:
            losses = early.square().mean((1, 2))
        if self.case.has("side_output"):
            losses = losses + sum(block.side for block in self._blocks())
        return losses

    def _run_block(self, block: Block, x: Tensor) -> Tensor:
        if self.case.has("layer_by_layer"):
            hidden = block.inner[0](block.norm(x)).tanh()
            return x + block.inner[1][0](hidden)
        if self.case.has("checkpointed"):
            return checkpoint(block, x, use_reentrant=False)["x"]
        return block(x)["x"]


@dataclass
class Trained:
    """What is left of a training run."""

    state: dict[str, Tensor]
    norms: list[float]
    optimizer: dict[str, Any]


def initial_net(case: Case, rank: int = 0) -> Net:
    """Build the net as it is before anything is communicated: another one on every rank."""
    torch.manual_seed(case.seed + 1000 * rank)
    return Net(case).to(case.dtype)


def batch(case: Case, step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return a rank's tokens, and whether its loss depends on all parts of the model."""
    generator = torch.Generator().manual_seed(case.seed + 7919 * (step * 64 + micro * 8 + rank))
    tokens = torch.randint(VOCABULARY, (case.num_samples, 3), generator=generator)
    return tokens, torch.tensor(rank != 1)


def loss_of(net: Callable[..., Tensor], case: Case, tokens: Tensor, use: Tensor) -> Tensor:
    """Return the mean loss, of two forward passes where the case says so."""
    if not case.has("two_forwards"):
        return net(tokens, use).mean() / case.num_micro_batches
    first, second = net(tokens, use), net(tokens.flip(0), use)
    return (first + second.sin()).mean() / case.num_micro_batches


def differs_by_rank(case: Case) -> bool:
    """Tell whether one rank's loss depends on fewer parts of the model than the others'."""
    return bool({"sometimes", "detached", "bypassed"} & case.features)


def optimizer_of(case: Case, parameters: Any) -> torch.optim.Optimizer:
    cls, settings = OPTIMIZERS[case.optimizer]
    return cls(parameters, **settings)


def train_alone(
    case: Case, world_size: int, *, dtype: torch.dtype | None = None, whole: bool = True
) -> Trained:
    """Train on all ranks' data in this process, at once or rank by rank."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as ranks do: how sums are divided decides on their last bits
    try:
        return _train_alone(case, world_size, dtype or case.dtype, whole)
    finally:
        torch.set_num_threads(num_threads)


def _train_alone(case: Case, world_size: int, dtype: torch.dtype, whole: bool) -> Trained:
    net = initial_net(case).to(dtype)
    optimizer = optimizer_of(case, [p for p in net.parameters() if p.requires_grad])
    norms = []
    for step in range(case.num_steps):
        optimizer.zero_grad(set_to_none=not case.has("zeroed"))
        for micro in range(case.num_micro_batches):
            parts = [batch(case, step, micro, rank) for rank in range(world_size)]
            if whole and not differs_by_rank(case):
                loss_of(net, case, torch.cat([t for t, _ in parts]), parts[0][1]).backward()
            else:
                for tokens, use in parts:
                    (loss_of(net, case, tokens, use) / world_size).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), _max_norm(case)).item())
        optimizer.step()
    return Trained(dict(net.state_dict()), norms, optimizer.state_dict())


def _max_norm(case: Case) -> float:
    # Bitwise equality needs gradients as they are; the norms are summed in another order.
    return 1e9 if case.optimizer == "sgd" else 1.0


def train_on_rank(case: Case, strategy: str = "fsdp", **more: Any) -> Trained:
    """Train on this rank's data, together with the other ranks."""
    model, optimizer, norms = start(case, strategy, **more)
    for step in range(case.num_steps):
        norms.append(train_step(case, model, optimizer, step))
    full_optimizer = getattr(model, "full_optimizer_state_dict", lambda _: {})
    return Trained(_on_cpu(model.full_state_dict()), norms, full_optimizer(optimizer))


def start(
    case: Case, strategy: str = "fsdp", **more: Any
) -> tuple[DataParallel, torch.optim.Optimizer, list[float]]:
    net = initial_net(case, dist.get_rank()).to(communication_device())
    find_unused = case.has("unused") or differs_by_rank(case)
    model = wrap(net, strategy, find_unused=find_unused, **case.options, **more)
    cls, settings = OPTIMIZERS[case.optimizer]
    return model, model.build_optimizer(cls, **settings), []


def train_step(
    case: Case, model: DataParallel, optimizer: torch.optim.Optimizer, step: int
) -> float:
    """Run one step and return the gradients' norm."""
    optimizer.zero_grad(set_to_none=not case.has("zeroed"))
    for micro in range(case.num_micro_batches):
        tokens, use = (t.to(communication_device()) for t in batch(case, step, micro, rank()))
        is_last = micro == case.num_micro_batches - 1
        with nullcontext() if is_last else model.no_sync():
            loss_of(model, case, tokens, use).backward()
    model.finish_gradient_synchronization()
    norm = model.clip_grad_norm(_max_norm(case)).item()
    optimizer.step()
    return norm


def rank() -> int:
    return dist.get_rank()


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() for name, value in state.items()}


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Tell whether two states have the same names, dtypes and bits."""
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )
