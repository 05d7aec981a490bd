"""Training, from the data to the trained model, alone or on every rank of a group.

At the end of a step come, where they are due: the log's line, the evaluation, the checkpoint; then
the question whether to stop. Between those the host never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cs336_systems.errors import bad
from cs336_systems.model import build_model, compile_model
from cs336_systems.parallel import checkpoint, wrap
from cs336_systems.parallel.base import DataParallel
from cs336_systems.train.batches import Batches
from cs336_systems.train.config import DTYPES, PipelineConfig, TrainingConfig
from cs336_systems.train.evaluate import perplexity, validation_loss
from cs336_systems.train.inputs import Inputs, open_inputs
from cs336_systems.train.losses import Losses
from cs336_systems.train.prefetch import Prefetcher
from cs336_systems.train.reporter import Reporter
from cs336_systems.train.sampling import sample_text
from cs336_systems.train.saver import Saver
from cs336_systems.train.state import capture, check_identity, restore, seed_rank
from cs336_systems.train.step import Stepper, build_optimizer, learning_rate
from cs336_systems.train.stop import StopSignal
from cs336_systems.train.throughput import Throughput
from cs336_systems.train.tokenizer import BpeTokenizer


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended; what an interrupted one did not come to is None or empty."""

    final_step: int
    train_loss: float | None
    validation_loss: float | None
    perplexity: float | None
    sample: str
    was_interrupted: bool
    log_path: Path
    curve_path: Path
    checkpoint_dir: Path


def train(
    config: PipelineConfig,
    *,
    tokenizer: BpeTokenizer,
    train_tokens: Path,
    validation_tokens: Path,
    output_dir: Path,
) -> TrainResult:
    """Train, or go on from the newest good checkpoint; call it on every rank of the default group.

    Raises: UsageError for what cannot be trained or resumed, and for a loss that is not finite;
        CheckpointError for a checkpoint that cannot be read or written.
    """
    inputs = open_inputs(
        config,
        tokenizer=tokenizer,
        train_tokens=Path(train_tokens),
        validation_tokens=Path(validation_tokens),
        output_dir=Path(output_dir),
    )
    with StopSignal() as stop:
        run = _Run(inputs, stop)
        try:
            result = run.train()
        except BaseException:
            run.saver.abandon()
            raise
        run.saver.close()
    return result


def build(inputs: Inputs) -> DataParallel:
    """Build the config's model, compiled and wrapped as it says, with the same weights on any
    number of ranks."""
    training = inputs.config.training
    torch.manual_seed(training.seed)
    model = build_model(inputs.model, attention=training.attention_kernel, device=inputs.device)
    wrapped = wrap(
        compile_model(model, training.compile), training.ddp_wrapper, **_options(training)
    )
    seed_rank(training.seed, dist.get_rank())
    return wrapped


def _options(training: TrainingConfig) -> dict[str, Any]:
    return {
        name: DTYPES[value] if name.endswith("dtype") and value is not None else value
        for name, value in training.ddp_options.items()
    }


class _Run:
    """One run in this process."""

    def __init__(self, inputs: Inputs, stop: StopSignal) -> None:
        self.inputs, self.config, self.stop = inputs, inputs.config, stop
        self.rank = dist.get_rank()
        self.model = build(inputs)
        self.optimizer = build_optimizer(self.model, self.config.training)
        self.stepper = Stepper(self.model, self.optimizer, self.config.training, inputs.device)
        self.checkpoint_dir = inputs.output_dir / "checkpoints"
        self.saver = Saver(
            self.checkpoint_dir, keep=self.config.checkpointing.keep, device=inputs.device
        )
        self.losses = Losses(self.config.training.num_ranks)
        self.step = self.saved_step = 0
        self.sample = ""
        self.validation_loss: float | None = None
        earlier_seconds = self._resume() if self.config.checkpointing.resume else 0.0
        self.throughput = Throughput(
            inputs.model, self.config.training, inputs.device, earlier_seconds=earlier_seconds
        )

    def train(self) -> TrainResult:
        """Take all steps that are left, and finish."""
        reporter = Reporter(self.inputs, rank=self.rank, last_step=self.step)
        with reporter:
            was_interrupted = self._take_steps(reporter)
            self._save()
            if not was_interrupted:
                if self.validation_loss is None:  # all steps had been taken before
                    self._evaluate()
                reporter.finish(self.model.full_state_dict(), self.sample)
        return TrainResult(
            final_step=self.step,
            train_loss=self.losses.loss,
            validation_loss=self.validation_loss,
            perplexity=None if self.validation_loss is None else perplexity(self.validation_loss),
            sample=self.sample,
            was_interrupted=was_interrupted,
            log_path=reporter.log_path,
            curve_path=reporter.curve_path,
            checkpoint_dir=self.checkpoint_dir,
        )

    def _take_steps(self, reporter: Reporter) -> bool:
        """Train until the last step, or until all ranks were asked to stop, which is returned."""
        training = self.config.training
        steps = range(self.step + 1, training.num_steps + 1)
        batches = Batches(
            self.inputs.train,
            batch_size=training.batch_size,
            context_length=self.inputs.model.context_length,
            seed=training.seed,
            rank=self.rank,
            world_size=training.num_ranks,
        )
        with Prefetcher(batches.batch, steps, self.inputs.device) as data:
            self.throughput.restart()
            for self.step in steps:
                self.losses.add(self.step, *self.stepper.step(self.step, data.next()))
                self.throughput.stepped()
                reporter.stepped()
                self._do_what_is_due(reporter)
                if self.stop.is_agreed() and self.step < training.num_steps:
                    return True
        return False

    def _do_what_is_due(self, reporter: Reporter) -> None:
        is_evaluated = self._is_due(self.config.evaluation.interval)
        if is_evaluated or self._is_due(self.config.logging.interval):
            self._log(reporter, is_evaluated=is_evaluated)
        if self._is_due(self.config.checkpointing.checkpointing_interval):
            self._save()

    def _is_due(self, interval: int) -> bool:
        is_last = self.step == self.config.training.num_steps
        return is_last or (interval > 0 and self.step % interval == 0)

    def _log(self, reporter: Reporter, *, is_evaluated: bool) -> None:
        self.losses.read()
        line: dict[str, Any] = {
            "step": self.step,
            "loss": self.losses.loss,
            "mean_loss": self.losses.take_mean(),
            "lr": learning_rate(self.config.training, self.step),
            "grad_norm": self.losses.norm,
            **self.throughput.rates(),
        }
        self.throughput.restart()
        if is_evaluated:
            loss = self._evaluate()
            line |= {"validation_loss": loss, "perplexity": perplexity(loss), "sample": self.sample}
            self.throughput.restart()  # evaluating is no training; logging and saving are
        reporter.write(line)

    def _evaluate(self) -> float:
        context_length = self.inputs.model.context_length
        self.validation_loss = validation_loss(
            self.model, self.inputs.validation, self.config, context_length
        )
        wanted = self.config.evaluation.sample_tokens
        is_last = self.step == self.config.training.num_steps
        self.sample = sample_text(
            self.model,
            self.inputs.tokenizer,
            self.config,
            context_length=context_length,
            num_tokens=wanted if is_last else wanted // 4,
        )
        return self.validation_loss

    def _save(self) -> None:
        if self.step == self.saved_step:
            return
        # Weights that are no numbers must not take the place of good ones.
        self.losses.read()
        about = {
            "identity": self.inputs.identity,
            "step": self.step,
            "loss": self.losses.loss,
            "losses_since_line": self.losses.since_line,
            "seconds": self.throughput.seconds,
        }
        self.saver.save(capture(self.model, self.optimizer, about), self.step)
        self.saved_step = self.step

    def _resume(self) -> float:
        """Take up the newest good checkpoint, if there is one; returns the seconds spent so far."""
        if not checkpoint.exists(self.checkpoint_dir):
            return 0.0
        state, self.step = checkpoint.load(self.checkpoint_dir)
        check_identity(state["identity"], self.inputs.identity)
        num_steps = self.config.training.num_steps
        if self.step > num_steps:
            rule = f"be at least the checkpoint's step {self.step}"
            raise bad("resume", "training.num_steps", rule, num_steps)
        restore(state, self.model, self.optimizer)
        self.saved_step, self.losses.loss = self.step, state["loss"]
        self.losses.since_line = list(state["losses_since_line"])
        return float(state["seconds"])
