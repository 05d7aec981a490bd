"""Training one model on several devices at once: one table of strategies, one function to wrap.

Every row is a class `(module, **options)` with the methods of `base.DataParallel`. The loop of a
training program is the same for all of them:

    model = wrap(module, "flashddp")
    optimizer = model.build_optimizer(AdamW, lr=1e-3)
    ...
    model(x).sum().backward()
    model.finish_gradient_synchronization()
    optimizer.step()
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from cs336_systems.errors import unknown
from cs336_systems.table import Entry, Table

if TYPE_CHECKING:
    from torch import nn

    from cs336_systems.parallel.base import DataParallel

_HERE = "cs336_systems.parallel"

STRATEGIES = Table(
    "strategies",
    {
        "none": Entry(
            target=f"{_HERE}.naive:Local",
            summary="no communication: every rank trains alone",
        ),
        "naive": Entry(
            target=f"{_HERE}.naive:Naive",
            summary="one all-reduce per gradient, after the backward pass",
        ),
        "flat": Entry(
            target=f"{_HERE}.flat:Flat",
            summary="one all-reduce of all gradients together, after the backward pass",
        ),
        "overlapped": Entry(
            target=f"{_HERE}.overlapped:Overlapped",
            summary="one all-reduce per gradient, during the backward pass",
        ),
        "flashddp": Entry(
            target=f"{_HERE}.bucketed:FlashDDP",
            summary="one all-reduce per bucket whose memory is the gradients, during the "
            "backward pass",
        ),
        "flashddp_ce": Entry(
            target=f"{_HERE}.bucketed_ce:FlashDDPCE",
            summary="flashddp whose gradients travel by copy engines, between the GPUs of one host",
        ),
        "zero1": Entry(
            target=f"{_HERE}.zero1:Zero1",
            summary="flashddp, with optimizer state on one rank per parameter and parameters sent "
            "during the next forward pass",
        ),
        "fsdp": Entry(
            target=f"{_HERE}.fsdp:FullyShardedDataParallel",
            summary="weights, gradients and optimizer state in shards; gathered ahead of use",
        ),
        "torch_ddp": Entry(
            target=f"{_HERE}.peers:TorchDDP",
            summary="torch's DistributedDataParallel",
            peer=True,
        ),
        "torch_zero": Entry(
            target=f"{_HERE}.peers_zero:TorchZero",
            summary="torch's DistributedDataParallel with its ZeroRedundancyOptimizer",
            peer=True,
        ),
        "torch_fsdp2": Entry(
            target=f"{_HERE}.peers_fsdp:TorchFSDP2",
            summary="torch's fully_shard, block by block",
            peer=True,
        ),
    },
)


def wrap(module: nn.Module, strategy: str, **options: Any) -> DataParallel:
    """Make `module` train on all ranks of a group by the table's row `strategy`.

    Raises: UsageError for an unknown strategy or option, or a module that cannot be wrapped.
    """
    cls = STRATEGIES[strategy].load()
    known = option_names(cls)
    for name in options:
        if name not in known:
            raise unknown(f"wrap {strategy}", "option", known, name)
    return cls(module, **options)


def option_names(cls: Any) -> list[str]:
    """Return the options a strategy's class takes, its own first."""
    names: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        names.update(dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY))
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return [name for name in names if name != "own_options"]
