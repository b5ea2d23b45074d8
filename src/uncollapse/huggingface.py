"""The monitor as a callback of transformers' `Trainer`.

    trainer.add_callback(MonitorCallback(trainer, batches, every=50, trail="run.jsonl"))

Figures go through `trainer.log()`, so every reporter and `trainer.state.log_history` see them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from uncollapse.monitoring.monitor import Log, Monitor


class MonitorCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not type-checked
    """Looks at the model before training and after every `every` optimizer steps. `monitor` is the `Monitor`, once training began.

    trainer: the one that it is added to. batches and options: those of `Monitor`. With `texts` the trainer's own tokenizer is used
    unless another is given. `each_head` is off here: some reporters print whatever is logged. The loss beside the figures is the
    last one that the trainer logged, which is a mean over its `logging_steps`.
    """

    def __init__(self, trainer: Trainer, batches: Iterable[Mapping[str, Tensor]] | None = None, **options: Any) -> None:
        self.monitor: Monitor | None = None
        self._batches = batches
        self._options = {"each_head": False, "log": _logging(trainer), **options}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **given: Any
    ) -> None:
        """Prove the model's parts, and look for the first time."""
        if self._batches is None:
            self._options.setdefault("tokenizer", given.get("processing_class"))
        self.monitor = Monitor(model, self._batches, **self._options)
        self.monitor.step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Look, if it is time to."""
        if self.monitor is not None:
            losses = (entry["loss"] for entry in reversed(state.log_history) if "loss" in entry)
            self.monitor.step(state.global_step, loss=next(losses, None))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take off what waits for a further step."""
        if self.monitor is not None:
            self.monitor.close()


def _logging(trainer: Trainer) -> Log:
    """`trainer.log`, without a reference that would keep the trainer and its model alive."""
    reference = weakref.ref(trainer)

    def log(figures: dict[str, float], step: int) -> None:
        owner = reference()
        if owner is None:
            return
        # A log of ours must not stand for the trainer's own of this step, which is still to come.
        is_due = owner.control.should_log
        owner.log(figures)
        owner.control.should_log = is_due

    return log
