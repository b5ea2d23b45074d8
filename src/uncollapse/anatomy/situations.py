"""For which situation a proved anatomy holds, and remembering it for as long as the model is in that one.

A model object is not always the same model: its attention implementation can be exchanged, a number in it says how often a
block runs, an argument that is given or not sends it another way. A *situation* is all that can be seen of this from outside
without running it: modules and what kind they are, shapes and formats of parameters, plain attributes of modules and of their
configurations, autocast, the `Layout` given, and the names, formats and axes of the inputs. It is compared on each call, which
costs a fraction of a millisecond a hundred modules.

What cannot be seen from outside (a global variable, a clock) shows in the measured pass: see `ChangedPath`.

When not to use it: after editing numbers inside tensors, which change no anatomy.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from uncollapse.anatomy.autocast import AutocastState
from uncollapse.anatomy.module_states import PLAIN, steer_by
from uncollapse.restoring import is_own, restoring

REMEMBERED = 8  # situations of one model
LONGEST = 256  # entries of a list or mapping that is looked into
_VALUES = (*PLAIN, enum.Enum, torch.dtype, torch.device)
# `training` is another mode than a probe's, which is always evaluation; the rest is torch's own book-keeping.
# What accelerate's hooks keep is which device the last input came from; that they are there shows in `forward`.
_NOT_STEERING = frozenset(vars(nn.Module())) | {"_compiled_call_impl", "forward", "_hf_hook"}
_NOT_STEERING_CONFIG = frozenset({"use_cache"})  # off in every probe

Anatomy = TypeVar("Anatomy")


@dataclass(frozen=True)
class Situation:
    """A model as it stands, the layout given for it, and what kind of input it is given. Holds plain values only. The `sizes` of
    the input make another situation of it for those models alone whose way depends on them."""

    model: object
    layout: object
    inputs: object
    sizes: object = field(default=None, compare=False)

    @staticmethod
    def of(model: nn.Module, batch: Mapping[str, Any], layout: object = None) -> Situation:
        """The situation of `model` that is about to run on `batch`."""
        return Situation(model_state(model), layout, _inputs(batch), sizes_of(batch))


@dataclass(frozen=True)
class Remembered(Generic[Anatomy]):
    """What was proved in a situation, and the piece of the user's batch it was proved on; `steers` where the model's own run on
    that piece sends later runs another way. `sizes` of the batch where the anatomy holds for these alone; None: for all."""

    anatomy: Anatomy
    example: dict[str, Any]
    steers: bool
    sizes: object = None


_remembered: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Situation, Remembered[Any]]] = weakref.WeakKeyDictionary()
_held: weakref.WeakKeyDictionary[nn.Module, Remembered[Any]] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, situation: Situation, found: Remembered[Any]) -> None:
    """Keep what was proved; the situation that was met longest ago gives way to a ninth."""
    known = _remembered.setdefault(model, OrderedDict())
    known[situation] = found
    known.move_to_end(situation)
    while len(known) > REMEMBERED:
        known.popitem(last=False)
    steer_by(model, found.example if found.steers else None)


def recalled(model: nn.Module, situation: Situation) -> Remembered[Any] | None:
    """What was proved in this very situation, or is held whatever the situation."""
    if model in _held:
        return _held[model]
    known = _remembered.get(model)
    if known is None or situation not in known or known[situation].sizes not in (None, situation.sizes):
        return None
    known.move_to_end(situation)
    steer_by(model, known[situation].example if known[situation].steers else None)
    return known[situation]


def latest(model: nn.Module, batch: Mapping[str, Any] | None = None) -> Remembered[Any] | None:
    """What was proved last of the model as it stands now, with whatever layout; with a `batch`, on inputs of its kind."""
    if model in _held:
        return _held[model]
    known = _remembered.get(model)
    if not known:
        return None
    state = model_state(model)
    inputs, sizes = (None, None) if batch is None else (_inputs(batch), sizes_of(batch))
    for situation in reversed(known):
        if situation.model == state and inputs in (None, situation.inputs):
            return recalled(model, replace(situation, sizes=known[situation].sizes if batch is None else sizes))
    return None


@contextlib.contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Within the block the model's anatomy is what it was proved to be last, whatever its situation: parts are away from it, and
    of what is left nothing could be proved."""
    found = latest(model)
    with restoring() as changes:
        if found is not None and model not in _held:
            changes.undo(functools.partial(_held.pop, model, None))
            _held[model] = found
        yield


def forget(model: nn.Module) -> None:
    """Forget what was proved of `model`: the next call reads and proves it anew.

    Never needed for what can be seen from outside, nor to free the memory of a model, which is not kept alive. Call it after
    a change that shows nowhere in the modules, such as other code behind a global variable.
    """
    _remembered.pop(model, None)
    steer_by(model, None)


def model_state(model: nn.Module) -> object:
    """All that can be seen of a model without running it, beside the numbers in its tensors: hashable, and without the model."""
    found: list[object] = []
    known: set[int] = set()
    devices: set[str] = set()
    for name, module in model.named_modules():
        tensors = [
            (k, type(t), t.shape, t.dtype, t.device.type)
            for kept in (module._parameters, module._buffers)
            for k, t in kept.items()
            if t is not None
        ]
        devices |= {t[-1] for t in tensors}
        # What DDP keeps beside the model is its own book-keeping: how often it ran, and what is still to be exchanged.
        own = {} if isinstance(module, nn.parallel.DistributedDataParallel) else vars(module)
        found.append((name, type(module), tuple(tensors), *_plain(own, _NOT_STEERING, known)))
        if "forward" in vars(module):
            found.extend(_codes(module))
    return tuple(found), AutocastState.here(*(devices - {"meta"}))


def _plain(attributes: Mapping[str, Any], ignored: frozenset[str], known: set[int] | None) -> tuple[object, ...]:
    """The plain values among attributes, with lists and mappings of such, and with those of configurations and other objects
    that are no modules (`known`: by identity, those looked into before; None: look into none)."""
    found: list[object] = []
    for key, value in attributes.items():
        if key in ignored:
            continue
        if isinstance(value, _VALUES):
            found.append((key, type(value), value))
        elif isinstance(value, (list, tuple, set, frozenset)):
            if len(value) <= LONGEST and all(isinstance(v, _VALUES) for v in value):
                found.append((key, tuple(sorted(map(repr, value)) if isinstance(value, (set, frozenset)) else value)))
        elif isinstance(value, dict):
            if len(value) <= LONGEST:
                found.append((key, tuple((repr(k), v) for k, v in value.items() if isinstance(v, _VALUES))))
        elif known is not None and not isinstance(value, (Tensor, nn.Module, type)) and id(value) not in known:
            inside = getattr(value, "__dict__", None)
            if isinstance(inside, dict) and not callable(value):
                known.add(id(value))
                found.append((key, type(value), *_plain(inside, _NOT_STEERING_CONFIG, None)))
    return tuple(found)


def _codes(module: nn.Module) -> tuple[object, ...]:
    """What stands in for a module's `forward` on the instance: the code of each function around the class's own, ours left out."""
    found = _chain(vars(module)["forward"])
    return () if found == _chain(type(module).forward) else found


def _chain(function: Callable[..., Any] | None) -> tuple[object, ...]:
    found: list[object] = []
    while function is not None:
        if not is_own(function):
            found.append(getattr(function, "__code__", type(function)))
        function = getattr(function, "__wrapped__", None)
    return tuple(found)


def sizes_of(batch: Mapping[str, Any]) -> object:
    """The sizes of a batch's tensors."""
    return tuple((name, tuple(value.shape)) for name, value in batch.items() if isinstance(value, Tensor))


def _inputs(given: Any) -> object:
    """Names, formats and axes of inputs; of token numbers and masks also whether all of them are 1: padding goes another way."""
    if isinstance(given, Tensor):
        marked = given.ndim == 2 and not given.is_floating_point() and bool((given == 1).all())
        return type(given), given.dtype, tuple(n == 1 for n in given.shape[1:]), given.ndim, marked
    if isinstance(given, Mapping):
        return tuple((name, _inputs(value)) for name, value in given.items())
    if isinstance(given, (list, tuple)):
        return type(given), tuple(map(_inputs, given))
    return given if isinstance(given, _VALUES) else type(given)
