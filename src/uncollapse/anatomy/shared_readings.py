"""Passes of a model whose weights are kept elsewhere, made together, so that each weight is read once for all of them.

accelerate reads a weight when its module runs: a pass reads all of them, and so does the next. Here passes advance together, from
stretch to stretch. A *stretch* is a module that runs with its weights held: a block, or a module outside the blocks that has
weights elsewhere. A pass stops where a stretch begins that is not the one being held. When all have stopped, its weights are let
go, and those of the stretch at which the first pass stands are read as they are wanted.

What comes between two stretches is the model's own code, so that each pass is held in a thread of its own. One thread runs at a
time, in the order of the passes, and they change nowhere but at the begin of a stretch. So nothing needs a lock, and what several
passes add to one statistic in one stretch comes in their order. What a thread inherits of torch's settings is that of the caller's.

Raised is what would be, were the passes made one after the other: what the first of them raises that raises. An interrupt ends
them all. Passes that could not be made so are `EntangledPasses`: of a model that draws random numbers, which would be dealt out in
another order, or that leaves something in its modules which is not there for the next pass alone.

When not to use it: for passes that need what another one found, or that change the model for a while.
"""

from __future__ import annotations

import contextlib
import contextvars
import queue
import random
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from uncollapse.anatomy.module_states import ModuleStates
from uncollapse.anatomy.offloaded_weights import held_weights, is_kept_elsewhere
from uncollapse.anatomy.thread_settings import ThreadSettings
from uncollapse.anatomy.turns import own_thread, serving
from uncollapse.errors import UncollapseError
from uncollapse.restoring import restoring

COPIES = (
    16  # of its stream that a pass keeps: the model's own, those that wait to be compared, what is computed of them
)
AT_LEAST = 64 * 2**20  # bytes that passes made together may take in any case

Made = TypeVar("Made")


class EntangledPasses(UncollapseError):  # noqa: N818 - what is found, as in the other errors
    """Passes made together would not give what they give one after the other."""


def stretches(model: nn.Module, blocks: Collection[str]) -> list[nn.Module]:
    """The modules that run as a whole while their weights are held: `blocks`, by name, and outside of them whatever has weights
    elsewhere and no block in it. Empty where none is kept elsewhere."""
    whole = {id(model.get_submodule(name)) for name in blocks}
    found: dict[int, nn.Module] = {}

    def look(module: nn.Module) -> None:
        has_block = any(id(each) in whole for each in module.modules() if each is not module)
        if id(module) in whole or (is_kept_elsewhere(module) and not has_block):
            if any(map(is_kept_elsewhere, module.modules())):
                found[id(module)] = module
            return
        for child in module.children():
            look(child)

    look(model)
    return list(found.values())


def can_be_shared(model: nn.Module, held: Sequence[nn.Module]) -> bool:
    """Whether passes over the model may be made together: every weight that is kept elsewhere belongs to a stretch. What the
    model itself holds, around its blocks, is let go by accelerate when the first pass is over. Nor may somebody watch torch's
    dispatch."""
    inside = {id(module) for stretch in held for module in stretch.modules()}
    own = all(id(module) in inside for module in model.modules() if is_kept_elsewhere(module))
    return bool(held) and own and torch._C._len_torch_dispatch_stack() == 0


def in_flight(batches: Sequence[Mapping[str, Any]], held: Sequence[nn.Module]) -> list[range]:
    """Which batches are passed together, by number: as many, one after the other, as keep no more than the weights of the largest
    stretch take, which have to fit anyway, or `AT_LEAST`. A batch keeps `COPIES` of its stream. That is as wide as the narrow side
    of the widest weight for each whole number of the batch, and as large as what the batch itself holds besides."""
    sizes = [sum(p.numel() * p.element_size() for p in stretch.parameters()) for stretch in held]
    width = max((min(p.shape) for stretch in held for p in stretch.parameters() if p.ndim > 1), default=1)
    element = max((p.element_size() for stretch in held for p in stretch.parameters()), default=4)
    room = max(AT_LEAST, *sizes)

    def kept(batch: Mapping[str, Any]) -> int:
        tensors = [value for value in batch.values() if isinstance(value, Tensor)]
        entries = max((t.numel() * (1 if t.is_floating_point() else width) for t in tensors), default=0)
        return entries * element * COPIES

    found, begin, taken = [], 0, 0
    for number, batch in enumerate(batches):
        own = kept(batch)
        if number > begin and taken + own > room:
            found.append(range(begin, number))
            begin, taken = number, 0
        taken += own
    return [*found, range(begin, len(batches))]


@contextlib.contextmanager
def read_once(model: nn.Module, held: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block, and in this thread, each stretch is held until a pass comes to the next one."""
    with restoring() as changes:
        readings = _Readings()
        changes.undo(readings.let_go)
        for stretch in held:
            changes.hook(stretch, "forward_pre", readings.enter, prepend=True)
            changes.hook(stretch, "forward", readings.leave, always_call=True)
        yield


def made_together(
    model: nn.Module,
    held: Sequence[nn.Module],
    passes: Sequence[Callable[[], Made]],
    finished: Callable[[int, Made], object] = lambda number, made: None,
) -> None:
    """Make the passes together. `finished` is given the number of each, and what it made, in their order; nothing else keeps that.

    Raises `EntangledPasses` where they have to be made one after the other. What was `finished` by then does not count."""
    readings = _Readings()
    several = [_Pass(work, readings) for work in passes]
    next_one, raised = 0, None
    with restoring() as changes:
        changes.undo(readings.let_go)
        for stretch in held:
            changes.hook(stretch, "forward_pre", readings.enter, prepend=True)
            changes.hook(stretch, "forward", readings.leave, always_call=True)
        changes.undo(lambda: _end(several))  # before the hooks are off: an interrupted pass stops at the next stretch
        watched: _Apart | None = None
        while any(not one.is_over for one in several):
            for number, one in enumerate(several):
                if one.is_over or (one.wants is not None and one.wants is not readings.held):
                    continue
                one.go_on()
                # What the first pass leaves before its first stretch is there for all of them.
                watched = watched or _Apart(model)
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
            if wanted is not None and wanted is not readings.held:
                readings.hold(wanted)
    if raised is not None:
        try:
            raise raised
        finally:
            raised = None  # it holds this frame, which would hold it


class _Readings:
    """Which stretch is held, and which pass a thread makes."""

    def __init__(self) -> None:
        self.held: nn.Module | None = None
        self.mine = _Mine()
        self._thread = own_thread()
        self._holding = contextlib.ExitStack()

    def hold(self, stretch: nn.Module) -> None:
        self.let_go()
        self._holding.enter_context(held_weights(stretch))
        self.held = stretch

    def let_go(self) -> None:
        self.held = None
        self._holding.close()

    def enter(self, stretch: nn.Module, *_: Any) -> None:
        if own_thread() != self._thread:
            return
        self.mine.depth += 1
        if self.mine.depth > 1 or stretch is self.held:
            return
        if self.mine.one is None:
            self.hold(stretch)
        else:
            self.mine.one.stop(stretch)

    def leave(self, *_: Any) -> None:
        if own_thread() == self._thread:
            self.mine.depth -= 1


class _EndedError(BaseException):
    """Ends a pass that nobody waits for any more. No `Exception`: the model's code may catch those."""


class _Mine(threading.local):
    """The pass that this thread makes, and how many stretches it is in."""

    def __init__(self) -> None:
        self.one: _Pass[Any] | None = None
        self.depth = 0


class _Pass(Generic[Made]):
    """One pass, in a thread of its own. `wants`: the stretch at which it stands."""

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

    def stop(self, stretch: nn.Module) -> None:
        """In the pass's own thread: wait until this stretch is held."""
        self.wants = stretch
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
    """Whether passes leave each other alone: how the modules of a model and the random numbers stood."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = list(model.buffers())
        self._modules, self._written, self._drawn = ModuleStates(model), self._versions(), _random_state()

    def check(self) -> None:
        """Raise `EntangledPasses` where they do not stand so any more."""
        python, *torch_states = _random_state()
        if python != self._drawn[0] or not all(map(torch.equal, torch_states, self._drawn[1:])):
            what = "random numbers were drawn"
        elif not self._modules.is_untouched() or self._written != self._versions():
            what = "something was left in the modules"
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
