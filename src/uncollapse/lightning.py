"""The monitor as a callback of Lightning's `Trainer`.

    Trainer(callbacks=[MonitorCallback(batches, every=50, trail="run.jsonl")])

Figures go to every logger of the trainer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:  # the same classes under their older name
    from pytorch_lightning import Callback, LightningModule, Trainer

from uncollapse.monitoring.monitor import Monitor


class MonitorCallback(Callback):  # type: ignore[misc]  # Lightning is not type-checked
    """Looks at the model before training and after every `every` optimizer steps. `monitor` is the `Monitor`, once training began.

    batches and options: those of `Monitor`. model: the name of the attribute of your `LightningModule` that is the model which
    takes these batches; without it the module itself, through its `forward`.
    """

    def __init__(
        self, batches: Iterable[Mapping[str, Tensor]] | None = None, *, model: str | None = None, **options: Any
    ) -> None:
        self.monitor: Monitor | None = None
        self._batches, self._model, self._options = batches, model, options
        self._seen = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prove the model's parts, and look for the first time."""
        loggers = list(trainer.loggers)

        def log(figures: dict[str, float], step: int) -> None:
            for logger in loggers:
                logger.log_metrics(figures, step=step)

        model: nn.Module = pl_module if self._model is None else getattr(pl_module, self._model)
        self.monitor = Monitor(model, self._batches, **{"log": log, **self._options})
        self.monitor.step(trainer.global_step)
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Look, if it is time to."""
        if self.monitor is None or trainer.global_step == self._seen:  # a batch of several that make one step
            return
        self._seen = trainer.global_step
        given = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        # Lightning has divided it by the number of batches that make a step.
        loss = given.detach() * trainer.accumulate_grad_batches if isinstance(given, Tensor) else None
        self.monitor.step(trainer.global_step, loss=loss)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take off what waits for a further step."""
        if self.monitor is not None:
            self.monitor.close()
