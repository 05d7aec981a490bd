"""Fully sharded data parallelism: each rank keeps a part of every large weight.

A step, for a unit (a block of the model, or a layer outside of blocks):

    forward   all-gather the weights, up to two units ahead; compute; free them
    backward  all-gather them again, ahead too; compute; reduce-scatter the gradients; free both

What stays is a shard of the masters, of their gradients and of the optimizer's state. Weights are
cast to `compute_dtype` before they travel. All that is no linear or embedding layer is replicated
and its gradients are averaged in one flat all-reduce.

Source: Rajbhandari et al., "ZeRO", section 5 (stage 3); Zhao et al., "PyTorch FSDP", section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cs336_systems.errors import UsageError, bad
from cs336_systems.parallel import fsdp_optimizer, fsdp_state
from cs336_systems.parallel.base import DataParallel
from cs336_systems.parallel.checks import parameters_once
from cs336_systems.parallel.collectives import all_reduce
from cs336_systems.parallel.fsdp_calls import Calls, FSDPRoot
from cs336_systems.parallel.fsdp_plan import plan_units
from cs336_systems.parallel.fsdp_reduce import Reductions
from cs336_systems.parallel.fsdp_report import OrderReport
from cs336_systems.parallel.fsdp_schedule import Schedule
from cs336_systems.parallel.fsdp_unit import Unit, current_backward
from cs336_systems.parallel.fsdp_wire import Wire
from cs336_systems.parallel.replicated import ReplicatedGradients
from cs336_systems.parallel.side_stream import SideStream


class FullyShardedDataParallel(DataParallel):
    """Shard the weights of all linear and embedding layers; `module`'s parameters become this
    rank's pieces of them, flat, which any elementwise optimizer steps as they are.

    Every forward pass must run the same layers on all ranks: a rank with one more, as in an
    evaluation of its own, waits for the others until the group's timeout.

    Several backward passes may precede one finish. In `no_sync()` their gradients add up unsharded
    in the masters' dtype, and travel once; outside of it each is reduced and adds up in shards.

    compute_dtype: of the gathered weights and of the inputs of their layers. Gradients travel in it
        too, unless communication_dtype says otherwise.
    reshard_after_forward: whether weights are freed between forward and backward; those of the last
        unit stay either way.
    checkpoint_blocks: recompute the activations of all children of module lists, or of the first so
        many of them, in the backward pass.
    Cost: two all-gathers and one reduce-scatter of every unit per step, but one all-gather for the
        last unit and for embeddings; at most four gathered units at a time.
    Raises: UsageError with the same text on every rank.
    """

    strategy = "fsdp"
    compiles_whole = False

    def __init__(
        self,
        module: nn.Module,
        *,
        compute_dtype: torch.dtype | None = None,
        reshard_after_forward: bool = True,
        checkpoint_blocks: bool | int = False,
        **options: Any,
    ) -> None:
        own = {
            "compute_dtype": compute_dtype,
            "reshard_after_forward": reshard_after_forward,
            "checkpoint_blocks": checkpoint_blocks,
        }
        if isinstance(module, nn.Module) and any(isinstance(m, FSDPRoot) for m in module.modules()):
            raise UsageError("fsdp: module must be wrapped once, got one that is wrapped already")
        super().__init__(module, own_options=own, **options)
        # After the options were compared, so that all ranks raise or none does.
        self._check(compute_dtype, checkpoint_blocks)
        self._side = SideStream(self._device)
        self._wire = Wire(
            group=self.group,
            rank=self.rank,
            world_size=self.world_size,
            side=self._side,
            average_op=self._average_op,
            divisor=self._divisor,
            watch=self._watch,
        )
        self._schedule = Schedule(reshard_after_forward=reshard_after_forward)
        self._shard(compute_dtype, checkpoint_blocks)
        self._report = OrderReport(
            len(self._parameters_once),
            self.group,
            self._device,
            check_finite=self.check_finite,
            take_digest=self._schedule.take_digest,
        )

    def _check(self, compute_dtype: torch.dtype | None, checkpoint_blocks: bool | int) -> None:
        if compute_dtype is not None and not compute_dtype.is_floating_point:
            raise bad(self.strategy, "compute_dtype", "be floating", compute_dtype)
        if int(checkpoint_blocks) < 0:
            raise bad(self.strategy, "checkpoint_blocks", "be >= 0", checkpoint_blocks)

    def _shard(self, compute_dtype: torch.dtype | None, checkpoint_blocks: bool | int) -> None:
        """Replace the weights by this rank's pieces, one unit after the other."""
        plans = plan_units(self.module)
        self._parameters_once = {}  # or the whole weights would live until the end
        self.units: list[Unit] = []
        roots: list[tuple[list[nn.Module], list[nn.Module]]] = []
        while plans:
            plan = plans.pop(0)
            roots.append((plan.roots, plan.blocks))
            dtypes = (compute_dtype, self.communication_dtype)
            self.units.append(Unit(plan, len(self.units), self._wire, *dtypes))
            del plan
        self._parameters_once = parameters_once(self.module)
        self._reductions = Reductions(self.units, self._schedule, lambda: self._synchronizing)
        calls = Calls(self._schedule, self._reductions, compute_dtype)
        num_left = sum(len(blocks) for _, blocks in roots)
        if checkpoint_blocks is not True:
            num_left = min(num_left, checkpoint_blocks)
        for unit, (its_roots, blocks) in zip(self.units, roots, strict=True):
            for root in its_roots:
                recompute = num_left > 0 and any(root is block for block in blocks)
                num_left -= recompute
                calls.attach(root, unit, recompute=recompute)
        self._replicated = ReplicatedGradients(
            self._replicated_parameters(), self._wire, self.communication_dtype
        )

    def _replicated_parameters(self) -> list[nn.Parameter]:
        sharded = {id(piece) for unit in self.units for flat in unit.flats for piece in flat.pieces}
        return [
            p for p in self._parameters_once.values() if p.requires_grad and id(p) not in sharded
        ]

    @property
    def gathered_bytes_peak(self) -> int:
        """Most bytes of gathered weights that were alive at once on this rank."""
        return self._wire.gathered.peak

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module."""
        if torch.is_grad_enabled():
            self._start_forward()
        if current_backward() == -1:
            self._schedule.walk_rest(only_begun=True)
            self._reductions.flush()
        with self._schedule.forward_pass():
            return self.module(*args, **kwargs)

    def clip_grad_norm(self, max_norm: float, *, error_if_nonfinite: bool = False) -> Tensor:
        """Scale all gradients so that their common norm is at most `max_norm`; returns the norm
        before, equal on all ranks."""
        if self._reductions.is_pending:
            raise UsageError("fsdp: finish_gradient_synchronization must be called before clipping")
        replicated = {id(parameter) for parameter in self._replicated.parameters}
        parameters = [p for p in self._parameters_once.values() if p.grad is not None]
        local = self._squared_norm([p for p in parameters if id(p) not in replicated])
        all_reduce(local, self.group)
        everywhere = self._squared_norm([p for p in parameters if id(p) in replicated])
        norm = (local + everywhere).sqrt()
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(f"fsdp: gradients must have a finite norm, got {norm.item()}")
        if parameters:
            norm = norm.to(torch.promote_types(parameters[0].dtype, torch.float32))
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def _squared_norm(self, parameters: list[nn.Parameter]) -> Tensor:
        # In fp64: squares of large norms overflow sooner than the norms.
        grads = [p.grad for p in parameters if p.grad is not None and p.numel()]
        if not grads:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        return torch.nn.utils.get_total_norm(grads).double().square()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load what `state_dict` gave on this rank, in the same division."""
        if kwargs.get("assign"):
            raise UsageError("fsdp: load_state_dict must copy into the shards, got assign=True")
        fsdp_state.check_pieces(self, args[0] if args else kwargs["state_dict"])
        return super().load_state_dict(*args, **kwargs)

    def full_state_dict(self) -> dict[str, Any]:
        """Return the plain module's state on every rank: whole tensors of the masters' dtype."""
        return fsdp_state.full_state_dict(self)

    def load_full_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state of the plain module, given to every rank.

        Raises: UsageError for names or shapes that are not the module's.
        """
        fsdp_state.load_full_state_dict(self, state)

    def full_optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return what the plain module's optimizer would return, on every rank."""
        return fsdp_optimizer.full_state_dict(self, optimizer)

    def load_full_optimizer_state_dict(
        self, optimizer: Optimizer, state: Mapping[str, Any]
    ) -> None:
        """Load a state of the plain module's optimizer, given to every rank."""
        fsdp_optimizer.load_full_state_dict(self, optimizer, state)

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return the state for `torch.distributed.checkpoint`, to save from or to load into.

        Files hold whole tensors under the plain module's names, whatever number of ranks wrote or
        reads them; the values are this rank's own memory, so that a load needs nothing after it.
        """
        return fsdp_state.sharded_state_dict(self)

    def forget_gathered(self) -> None:
        """Free gathered weights; whoever changes the shards by hand calls it."""
        self._schedule.release_all()

    # The step's protocol.

    def _prepare_forward(self) -> None:
        self._reductions.discard_dropped()

    def _synchronize(self) -> list[nn.Parameter]:
        self._reductions.discard_dropped()
        return super()._synchronize()

    def _reduce(self) -> None:
        self._reductions.begin_round()
        self._schedule.walk_rest(only_begun=False)
        self._schedule.release_all()
        self._reductions.launch_rest()
        self._replicated.launch()

    def _complete(self) -> None:
        self._reductions.complete()
        self._replicated.complete()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Refuse what would part the pieces from their shards, as moving to another device does."""
        super()._apply(fn, recurse)
        for unit in self.units:
            for flat in unit.flats:
                if not flat.holds_its_pieces:
                    raise UsageError("fsdp: module must be moved or cast before it is wrapped")
        return self
