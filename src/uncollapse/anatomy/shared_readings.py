"""Passes of a model whose weights are kept elsewhere, made together, so that each weight is read once for all of them.

accelerate reads a weight when its module runs: a pass reads all of them, and so does the next. Here passes advance together, from
stage to stage, each of them a module that runs with its weights held (`stages`). A pass stops where a stage begins that is not
the one being held. When all have stopped, its weights are let go, and those of the stage at which the first pass stands are read
as they are wanted.

What comes between two stages is the model's own code, so that each pass is held in a thread of its own. One thread runs at a
time, in the order of the passes, and they change nowhere but at the begin of a stage. So nothing needs a lock, and what several
passes add to one statistic in one stage comes in their order. What a thread inherits of torch's settings is that of the caller's.

Raised is what would be, were the passes made one after the other: what the first of them raises that raises. An interrupt ends
them all. Passes that could not be made so are `EntangledPasses`: of a model that draws random numbers, which would be dealt out in
another order, that leaves something in its modules which is not there for the next pass alone, or that runs several stages under
another setting of the process.

When not to use it: for passes that need what another one found, or that change the model for a while.
"""

from __future__ import annotations

import contextlib
import contextvars
import queue
import random
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from uncollapse.anatomy.module_states import ModuleStates
from uncollapse.anatomy.offloaded_weights import give_back_memory, held_weights
from uncollapse.anatomy.stages import can_be_shared, stages
from uncollapse.anatomy.thread_settings import ThreadSettings, process_settings
from uncollapse.anatomy.turns import own_thread, serving
from uncollapse.errors import UncollapseError
from uncollapse.restoring import restoring

Made = TypeVar("Made")


class EntangledPasses(UncollapseError):  # noqa: N818 - what is found, as in the other errors
    """Passes made together would not give what they give one after the other."""


@contextlib.contextmanager
def read_once(
    model: nn.Module, held: Sequence[nn.Module], leaving: Callable[[nn.Module], object] = lambda stage: None
) -> Iterator[None]:
    """Within the block, and in this thread, each stage is held until a pass comes to the next one. `leaving` is given it before
    its weights are let go."""
    with restoring() as changes:
        readings = _Readings(leaving)
        changes.undo(readings.let_go)
        for stage in held:
            changes.hook(stage, "forward_pre", readings.enter, prepend=True)
            changes.hook(stage, "forward", readings.leave, always_call=True)
        yield
        readings.leave_held()


def made_together(
    model: nn.Module,
    held: Sequence[nn.Module],
    passes: Sequence[Callable[[], Made]],
    finished: Callable[[int, Made], object],
    leaving: Callable[[nn.Module], object] = lambda stage: None,
) -> None:
    """Make the passes together. `finished` is given the number of each, and what it made, in their order; nothing else keeps that.
    `leaving` is given a stage that all of them have run as far as they go for now, before its weights are let go.

    Raises `EntangledPasses` where they have to be made one after the other. What was `finished` by then does not count."""
    readings = _Readings(is_for_several=True)
    several = [_Pass(work, readings) for work in passes]
    next_one, raised = 0, None
    with restoring() as changes:
        changes.undo(readings.let_go)
        for stage in held:
            changes.hook(stage, "forward_pre", readings.enter, prepend=True)
            changes.hook(stage, "forward", readings.leave, always_call=True)
        changes.undo(lambda: _end(several))  # before the hooks are off: an interrupted pass stops at the next stage
        watched, settings = None, process_settings()
        while any(not one.is_over for one in several):
            for number, one in enumerate(several):
                if one.is_over or (one.wants is not None and one.wants is not readings.held):
                    continue
                one.go_on()
                # What the first pass leaves before its first stage is there for all of them.
                watched = watched or _Apart(model, settings)
                watched.check()
                if one.error is not None:
                    raised = one.error
                    _end(several[number + 1 :])
                    del several[number:]  # so that only an earlier one can still raise another
                    break
                while next_one < len(several) and several[next_one].is_over:
                    finished(next_one, several[next_one].taken())
                    next_one += 1
            wanted = next((one.wants for one in several if not one.is_over), None)
            if wanted is not readings.held:
                if readings.held is not None and raised is None:
                    leaving(readings.held)
                if wanted is not None:
                    readings.hold(wanted)
    if raised is not None:
        try:
            raise raised
        finally:
            raised = None  # it holds this frame, which would hold it


def all_made(
    model: nn.Module, blocks: Collection[str], passes: Callable[[], Sequence[Callable[[], Made]]]
) -> list[Made]:
    """What each of several passes makes: together where they can share a reading, else one after the other. `passes` gives them,
    afresh for each try."""
    held, several = stages(model, blocks), passes()
    if len(several) > 1 and can_be_shared(model, held):
        found: list[Made] = []
        try:
            made_together(model, held, several, lambda _, made: found.append(made))
        except EntangledPasses:
            several = passes()
        else:
            return found
    return [work() for work in several]


class _Readings:
    """Which stage is held, and which pass a thread makes."""

    def __init__(
        self, leaving: Callable[[nn.Module], object] = lambda stage: None, *, is_for_several: bool = False
    ) -> None:
        self.held: nn.Module | None = None
        self.mine = _Mine()
        self._leaving, self._is_for_several = leaving, is_for_several
        self._thread = own_thread()
        self._holding = contextlib.ExitStack()

    def hold(self, stage: nn.Module) -> None:
        self.let_go()
        give_back_memory()
        self._holding.enter_context(held_weights(stage))
        self.held = stage

    def let_go(self) -> None:
        self.held = None
        self._holding.close()

    def leave_held(self) -> None:
        """The one pass has run the stage that is held."""
        if self.held is not None:
            with torch._C.DisableTorchFunction():  # nothing of this is an operation of the model
                self._leaving(self.held)

    def enter(self, stage: nn.Module, *_: Any) -> None:
        if own_thread() != self._thread:
            return
        self.mine.depth += 1
        if self.mine.depth > 1 or stage is self.held:
            return
        if self.mine.one is not None:
            self.mine.one.stop(stage)
        elif not self._is_for_several:  # else this is no pass of ours, but something that is run while they stand
            self.leave_held()
            self.hold(stage)

    def leave(self, *_: Any) -> None:
        if own_thread() == self._thread:
            self.mine.depth -= 1


class _EndedError(BaseException):
    """Ends a pass that nobody waits for any more. No `Exception`: the model's code may catch those."""


class _Mine(threading.local):
    """The pass that this thread makes, and how many stages it is in."""

    def __init__(self) -> None:
        self.one: _Pass[Any] | None = None
        self.depth = 0


class _Pass(Generic[Made]):
    """One pass, in a thread of its own. `wants`: the stage at which it stands."""

    def __init__(self, work: Callable[[], Made], readings: _Readings) -> None:
        self.wants: nn.Module | None = None
        self.is_over = False
        self.error: BaseException | None = None
        self._work, self._readings = work, readings
        self._made: list[Made] = []
        self.is_unwanted = self.is_running = False
        self._settings, self._caller = ThreadSettings(), own_thread()
        # Not `threading`'s own: who waits there is taken for a probe that waits for somebody else's pass.
        self._go: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._back: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(self._run,), daemon=True)

    def go_on(self) -> None:
        """Run until the pass stops again, or is over."""
        if self._thread.ident is None:
            self._thread.start()
        self.is_running = True
        self._go.put(None)
        self._back.get()

    def taken(self) -> Made:
        """What the pass made, which is not kept here any longer."""
        return self._made.pop()

    def stop(self, stage: nn.Module) -> None:
        """In the pass's own thread: wait until this stage is held."""
        self.wants = stage
        self._stand()
        self._wait()

    def _stand(self) -> None:
        self.is_running = False
        self._back.put(None)

    def end(self) -> None:
        """Wait until the pass, which is no longer wanted, has undone what it did."""
        self._go.put(None)
        if self._thread.ident is not None:
            self._thread.join()
        self.is_over = True

    def _wait(self) -> None:
        self._go.get()
        if self.is_unwanted:
            raise _EndedError

    def _run(self) -> None:
        try:
            self._wait()
            self._readings.mine.one = self
            with self._settings.taken(), serving(self._caller), restoring(gathers=True):
                self._made.append(self._work())
        except _EndedError:
            pass
        except BaseException as error:
            self.error = error
        self.is_over = True
        self._stand()


def _end(several: Sequence[_Pass[Any]]) -> None:
    """End passes that are not over, one after the other: first the one that was running when its caller was interrupted."""
    for one in several:
        one.is_unwanted = True
    for one in sorted(several, key=lambda one: not one.is_running):
        if not one.is_over:
            one.end()


class _Apart:
    """Whether passes leave each other alone: how a model's modules, random numbers and the settings of the process stood."""

    def __init__(self, model: nn.Module, settings: tuple[object, ...]) -> None:
        self._settings = settings
        self._buffers = list(model.buffers())
        self._modules, self._written, self._drawn = ModuleStates(model), self._versions(), _random_state()

    def check(self) -> None:
        """Raise `EntangledPasses` where they do not stand so any more."""
        python, *torch_states = _random_state()
        if python != self._drawn[0] or not all(map(torch.equal, torch_states, self._drawn[1:])):
            what = "random numbers were drawn"
        elif not self._modules.is_untouched() or self._written != self._versions():
            what = "something was left in the modules"
        elif self._settings != process_settings():
            what = "a setting of the whole process is another one for a while"
        else:
            return
        raise EntangledPasses(
            f"made_together: expected passes that leave nothing to each other, got some in which {what}. One after the other they "
            "would give something else. Make them so."
        )

    def _versions(self) -> list[int]:
        return [-1 if buffer.is_inference() else buffer._version for buffer in self._buffers]


def _random_state() -> list[Any]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return [random.getstate(), torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
