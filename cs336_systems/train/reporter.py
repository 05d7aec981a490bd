"""Where rank 0 says how training goes: the log, the bar, the sinks, and the files at the end."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from cs336_systems.train.atomic import replacing
from cs336_systems.train.curve import draw_curve
from cs336_systems.train.inputs import Inputs
from cs336_systems.train.run_log import RunLog, read_log
from cs336_systems.train.sinks import open_sinks


class Reporter:
    """Writes on rank 0 and does nothing on the others."""

    def __init__(self, inputs: Inputs, *, rank: int, last_step: int) -> None:
        self.log_path = inputs.output_dir / "log.jsonl"
        self.curve_path = inputs.output_dir / "loss.png"
        self._inputs, self._is_first = inputs, rank == 0
        self._last_step = last_step
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        config = self._inputs.config
        is_shown = self._is_first and config.logging.progress
        self._bar = tqdm(
            total=config.training.num_steps,
            initial=self._last_step,
            disable=not is_shown,
            desc=config.name,
            unit="step",
            dynamic_ncols=True,
            # In a file every refresh is a line of its own.
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )
        self._exit.callback(self._bar.close)
        if self._is_first:
            self._log = RunLog(self.log_path, last_step=self._last_step)
            self._exit.callback(self._log.close)
            self._sinks = open_sinks(config, self._inputs.output_dir, self._last_step)
            for sink in self._sinks:
                self._exit.callback(sink.close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.close()

    def stepped(self) -> None:
        """Move the bar."""
        self._bar.update()

    def write(self, line: Mapping[str, Any]) -> None:
        """Report a logged step.

        Raises: UsageError when the disk refuses.
        """
        if not self._is_first:
            return
        self._log.write(dict(line))
        self._bar.set_postfix_str(_brief(line), refresh=False)
        numbers = {
            name: value
            for name, value in line.items()
            if isinstance(value, int | float) and name != "step"
        }
        for sink in self._sinks:
            sink.write(line["step"], numbers)

    def finish(self, weights: Mapping[str, Tensor], sample: str) -> None:
        """Write the model as `from_pretrained` reads it, the sample and the curve.

        Raises: UsageError when the disk refuses.
        """
        if not self._is_first:
            return
        folder, model = self._inputs.output_dir, self._inputs.model
        with replacing(folder / "model.pt") as file:
            torch.save({name: weight.cpu() for name, weight in weights.items()}, file)
        with replacing(folder / "model_config.json") as file:
            file.write(json.dumps(asdict(model), indent=2).encode() + b"\n")
        with replacing(folder / "sample.txt") as file:
            file.write(sample.encode() + b"\n")
        name = self._inputs.config.name
        draw_curve(read_log(self.log_path), self.curve_path, name, math.log(model.vocab_size))


def _brief(line: Mapping[str, Any]) -> str:
    words = [f"loss {line['loss']:.3f}", f"{line['tokens_per_s']:,.0f} tokens/s"]
    words.append(f"{line['tflops']:.3g} TFLOP/s")
    if line["share_of_peak"] is not None:
        words.append(f"{line['share_of_peak']:.1%} of peak")
    if "validation_loss" in line:
        words.append(f"validation {line['validation_loss']:.3f}")
    return ", ".join(words)
