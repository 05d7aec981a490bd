"""What ranks run for the tests of traffic and held memory: one training step, looked at."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from cs336_basics.optimizer import AdamW
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cs336_systems.parallel import wrap
from cs336_systems.parallel.collectives import Collective, record_collectives
from cs336_systems.parallel.held import HeldBytes, held_bytes

WIDTH, HIDDEN = 64, 128
SHARDED = 2 * WIDTH * HIDDEN
REPLICATED = 2 * WIDTH
LARGEST_UNIT = WIDTH * HIDDEN
NUM_TENSORS = 4


class Looked(NamedTuple):
    """What was seen of one rank's step."""

    fresh: HeldBytes
    before_finish: HeldBytes
    after_step: HeldBytes
    log: list[Collective]
    finish_peak_bytes: int
    """The most that `finish_gradient_synchronization` allocated at once."""


class Net(nn.Module):
    """Two linear layers and a norm, every size a multiple of what anything is aligned to."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (samples, WIDTH) -> ()."""
        return self.norm(self.down(self.up(x).relu())).square().sum()


class Allocations(TorchDispatchMode):
    """Follows the storages that operators make, for as long as they live."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: found for key, found in self._alive.items() if not found[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(size for _, size in self._alive.values()))
        return result


def step(strategy: str, **options: Any) -> Looked:
    """Train one step and look at what is held and sent."""
    torch.manual_seed(0)
    model = wrap(Net(), strategy, **options)
    optimizer = model.build_optimizer(AdamW)
    fresh = held_bytes(model, optimizer)
    with record_collectives() as log:
        model(torch.randn(3, WIDTH)).backward()
        before_finish = held_bytes(model, optimizer)
        known = [p.grad for p in model.parameters() if p.grad is not None]
        with Allocations([*model.parameters(), *known]) as allocations:
            model.finish_gradient_synchronization()
        optimizer.step()
        if hasattr(optimizer, "wait"):
            optimizer.wait()
    after_step = held_bytes(model, optimizer)
    return Looked(fresh, before_finish, after_step, log, allocations.peak_bytes)
