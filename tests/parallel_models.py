"""Small models with everything that makes data parallelism hard, and their training, on a rank or
alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cs336_systems.parallel import wrap
from cs336_systems.parallel.collectives import communication_device

FEATURES = (
    "tied",
    "shared",
    "frozen",
    "unused",
    "sometimes",
    "buffers",
    "transposed",
    "odd",
    "mixed",
    "checkpointed",
    "two_forwards",
    "zeroed",
    "aliased",
)


@dataclass(frozen=True)
class Case:
    """What is trained and how."""

    seed: int
    widths: tuple[int, ...]
    features: frozenset[str]
    double: bool
    adamw: bool
    num_micro_batches: int
    samples: tuple[int, ...]
    """How many each rank has in a micro-batch; by rank."""
    bucket_size_mb: float | None
    in_place_mb: float | None = 1
    num_steps: int = 4


class Net(nn.Module):
    """A perceptron whose other parts depend on the case; returns one loss per sample."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        last = case.widths[-1]
        self.features = case.features
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(case.widths))
        if "tied" in case.features:
            self.tied, self.tied_again = nn.Linear(last, last), nn.Linear(last, last)
            self.tied_again.weight = self.tied.weight
        if "shared" in case.features:
            self.shared = nn.Linear(last, last)
        if "unused" in case.features:
            self.unused = nn.Linear(2, 3)
        if "sometimes" in case.features:
            self.sometimes = nn.Parameter(torch.randn(last))
        if "transposed" in case.features:
            self.transposed = nn.Parameter(torch.randn(3, last).t())
        if "odd" in case.features:
            self.scalar = nn.Parameter(torch.rand(()))
            self.single = nn.Parameter(torch.rand(1))
            self.empty = nn.Parameter(torch.rand(0, 2))
        if "buffers" in case.features:
            self.register_buffer("scale", torch.rand(last) + 0.5)
            self.register_buffer("num_seen", torch.zeros((), dtype=torch.int64))
            self.register_buffer("cache", torch.rand(2), persistent=False)
        if "aliased" in case.features:
            # Autograd gives these one memory, and reads it for the layer's gradient after that.
            self.vector = nn.Parameter(torch.randn(last))
            self.column = nn.Parameter(torch.randn(last, 1))
            self.offset = nn.Linear(last, last)
        if "mixed" in case.features:
            self.wide = nn.Linear(last, 2, dtype=torch.float64)
        if "frozen" in case.features:
            self.layers[0].weight.requires_grad_(False)
            # The last parameter, the only one of its dtype.
            self.unlike = nn.Parameter(torch.rand(2, dtype=torch.float16), requires_grad=False)

    def forward(self, x: Tensor, uses: Tensor) -> Tensor:
        """Shapes: x (samples, width), uses (samples,) flags of `sometimes` -> (samples,)."""
        for layer in self.layers:
            if "checkpointed" in self.features:
                x = checkpoint(layer, x, use_reentrant=False).tanh()
            else:
                x = layer(x).tanh()
        if "tied" in self.features:
            x = self.tied_again(self.tied(x).tanh()).tanh()
        if "shared" in self.features:
            x = self.shared(self.shared(x).tanh())
        if "transposed" in self.features:
            x = x + x @ self.transposed @ self.transposed.t()
        if "odd" in self.features:
            x = x * self.scalar + self.single + self.empty.sum()
        if "buffers" in self.features:
            self.num_seen += len(x)
            x = x * self.scale + self.cache.sum()
        if "sometimes" in self.features and uses.any():
            x = torch.where(uses[:, None], x * self.sometimes, x)
        if "aliased" in self.features:
            views = self.vector.view(1, -1) + self.column.view(1, -1)
            x = (x + (views + self.offset(x.new_ones(1, x.shape[1])))).tanh()
        if "mixed" in self.features:
            x = self.wide(x.double())
        return x.square().sum(1)


@dataclass
class Trained:
    """What is left of a training run."""

    state: dict[str, Tensor]
    grads: dict[str, Tensor | None]
    norms: list[float]


def initial_net(case: Case, rank: int) -> Net:
    """Build the net as it is before anything is communicated: another one on every rank."""
    torch.manual_seed(case.seed + 1000 * rank)
    net = Net(case)
    return net.double() if case.double else net


def micro_batch(case: Case, step: int, micro: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a rank's inputs, its flags of `sometimes` and its samples' weights in its loss."""
    generator = torch.Generator().manual_seed(case.seed + 7919 * (step * 64 + micro * 8 + rank))
    count = case.samples[rank]
    x = torch.randn(count, case.widths[0], generator=generator, dtype=torch.float64)
    uses = torch.full((count,), rank != 0)
    weights = torch.full((count,), 1 / (count * case.num_micro_batches), dtype=torch.float64)
    return x, uses, weights


def optimizer_of(case: Case) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    if case.adamw:
        # A large eps, lest the sign of a rounding error decide on a whole step.
        return torch.optim.AdamW, {"lr": 1e-2, "eps": 1e-3}
    return torch.optim.SGD, {"lr": 5e-2, "momentum": 0.9}


def loss_of(net: Callable[..., Tensor], case: Case, batch: tuple[Tensor, ...]) -> Tensor:
    """Return the weighted loss, of two forward passes where the case says so."""
    x, uses, weights = batch
    if "two_forwards" not in case.features:
        return (net(x, uses) * weights).sum()
    halves = zip(*(tensor.tensor_split(2) for tensor in (x, uses, weights)), strict=True)
    return sum(((net(x, uses) * weights).sum() for x, uses, weights in halves), torch.zeros(()))


def train_alone(case: Case, world_size: int, *, double: bool) -> Trained:
    """Train on all ranks' data in this process."""
    net = initial_net(case, 0)
    dtype = torch.float64 if double or case.double else torch.float32
    net = net.double() if double else net
    cls, settings = optimizer_of(case)
    optimizer = cls([p for p in net.parameters() if p.requires_grad], **settings)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_unalias)
    norms = []
    for step in range(case.num_steps):
        optimizer.zero_grad(set_to_none="zeroed" not in case.features)
        for micro in range(case.num_micro_batches):
            parts = [micro_batch(case, step, micro, rank) for rank in range(world_size)]
            x, uses, weights = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            whole = (x.to(dtype), uses, weights.to(dtype) / world_size)
            loss_of(net, case, whole).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0).item())
        optimizer.step()
    return _trained(net, norms)


def train_on_rank(case: Case, strategy: str, **options: Any) -> Trained:
    """Train on this rank's data, together with the other ranks."""
    rank, device = dist.get_rank(), communication_device()
    net = initial_net(case, rank).to(device)
    dtype = torch.float64 if case.double else torch.float32
    # Only torch's wrapper touches buffers between two forward passes of one step.
    if strategy == "torch_ddp" and "two_forwards" in case.features:
        options["broadcast_buffers"] = False
    if strategy in ("flashddp", "flashddp_ce", "torch_ddp"):
        options["bucket_size_mb"] = case.bucket_size_mb
    if strategy in ("flashddp", "flashddp_ce"):
        options["in_place_mb"] = case.in_place_mb
    model = wrap(net, strategy, find_unused=needs_find_unused(case), **options)
    cls, settings = optimizer_of(case)
    optimizer = model.build_optimizer(cls, **settings)
    norms = []
    for step in range(case.num_steps):
        optimizer.zero_grad(set_to_none="zeroed" not in case.features)
        for micro in range(case.num_micro_batches):
            x, uses, weights = micro_batch(case, step, micro, rank)
            batch = (x.to(device, dtype), uses.to(device), weights.to(device, dtype))
            if micro < case.num_micro_batches - 1:
                with model.no_sync():
                    loss_of(model, case, batch).backward()
            else:
                loss_of(model, case, batch).backward()
        model.finish_gradient_synchronization()
        norms.append(model.clip_grad_norm(1.0).item())
        optimizer.step()
    return _trained(net, norms)


def train_with_all(case: Case, strategies: list[str]) -> dict[str, Trained]:
    """Train once with each strategy."""
    return {strategy: train_on_rank(case, strategy) for strategy in strategies}


def _unalias(parameter: Tensor) -> None:
    """Give a gradient memory of its own, without which clipping scales shared memory twice."""
    assert parameter.grad is not None
    parameter.grad = parameter.grad.clone()


def needs_find_unused(case: Case) -> bool:
    return bool({"unused", "sometimes"} & case.features)


def _trained(net: Net, norms: list[float]) -> Trained:
    grads = {name: p.grad for name, p in net.named_parameters()}
    return Trained({name: p.detach() for name, p in net.named_parameters()}, grads, norms)
