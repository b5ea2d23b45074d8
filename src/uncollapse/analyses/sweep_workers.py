"""Who measures the checkpoints of a sweep: this process, one after the other, or the workers of a Ray cluster.

Both are asked in the same way: `submit` while there are `free` places, then `finished` for what has come back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from uncollapse.analyses.sweep_task import Task, failed, measured
from uncollapse.errors import InputError
from uncollapse.records.diagnosis import DiagnosisRecord
from uncollapse.records.sweep import Failure, SweepRecord

if TYPE_CHECKING:
    from uncollapse.probe.passes import Progress

Done = tuple[Task, DiagnosisRecord | SweepRecord]


class Workers(Protocol):
    """What a sweep asks of whoever measures."""

    @property
    def free(self) -> bool:
        """Whether one more can be submitted."""

    @property
    def busy(self) -> bool:
        """Whether something has not come back yet."""

    def submit(self, task: Task) -> None:
        """Have a checkpoint measured."""

    def finished(self) -> list[Done]:
        """What has come back since the last time; waits for a moment where nothing has."""


class Here:
    """This process. `submit` returns when the checkpoint is measured."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._done: list[Done] = []

    @property
    def free(self) -> bool:
        return not self._done

    @property
    def busy(self) -> bool:
        return bool(self._done)

    def submit(self, task: Task) -> None:
        self._done.append((task, measured(task, self._progress)))

    def finished(self) -> list[Done]:
        done, self._done = self._done, []
        return done


class OnRay:
    """A Ray cluster: one task a GPU, or a CPU where it has none. They need this package, and the models under the same names; the
    sweep's folder only this process needs. A worker that dies is a failure of its checkpoint.

    address: of a cluster that runs; "auto" for the one of this machine, "local" to start one in this process.
    """

    def __init__(self, address: str, machine: Mapping[str, Any]) -> None:
        try:
            import ray
        except ImportError:
            raise InputError(
                "sweep: expected Ray to be installed, got none. It is an optional part of uncollapse. "
                "Run: pip install 'uncollapse[ray]'"
            ) from None
        self._ray = ray
        self._mine = not ray.is_initialized()
        if self._mine:
            try:
                ray.init(address=address, log_to_driver=False, configure_logging=False, include_dashboard=False)
            except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
                raise InputError(
                    f"sweep: expected a Ray cluster at {address!r}, got none ({' '.join(str(error).split())[:200]}). "
                    "It may not have been started. Run `ray start --head`, or pass --ray=local."
                ) from None
        there = ray.cluster_resources()
        gpus = 0 if machine.get("device") == "cpu" else int(there.get("GPU", 0))
        self._slots = max(1, gpus or int(there.get("CPU", 1)))
        self._remote = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=0)(measured)
        self._running: dict[Any, Task] = {}

    @property
    def free(self) -> bool:
        return len(self._running) < self._slots

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def submit(self, task: Task) -> None:
        self._running[self._remote.remote(task)] = task

    def finished(self) -> list[Done]:
        ready, _ = self._ray.wait(list(self._running), timeout=1.0)
        done: list[Done] = []
        for reference in ready:
            task = self._running.pop(reference)
            try:
                done.append((task, self._ray.get(reference)))
            # The worker died: what a task raises itself is a record already.
            except self._ray.exceptions.RayError as error:
                said = " ".join(f"{type(error).__name__}: {error}".split())
                done.append((task, failed(task, Failure("crashed", said[:500]))))
        return done

    def close(self) -> None:
        """Stop what still runs, and leave the cluster if this joined it."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._mine:
            self._ray.shutdown()
