"""What running a model changes in its modules, beside numbers in tensors, and putting it back.

A forward may leave things behind: BigBird replaces its sparse attention by a full one on a short batch and keeps it; rotary
embeddings note the longest sequence they met; caches and counters fill up. A probe runs the model on other batches than the
user does, so whatever its runs leave behind is removed again.

Put back are the attributes of every module, its submodules and its buffers, by identity. Parameters are not: sharded and
offloaded models exchange them on their own account. Neither are attributes of torch's own modules, whose wrappers for several
devices prepare themselves in their first run, nor what a forward writes into a tensor that stays the same.

Hooks that a run has put on any module are taken off, for they go with the attributes: transformers notes on a model that it has
put up the hooks that collect hidden states. Without the note and with the hooks, it would put them up again, and collect twice.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from uncollapse.anatomy.turns import closed_to_others
from uncollapse.restoring import is_own, restoring, take_off

# Mode, `forward`, how it is copied: others put those back. Hooks are looked at one by one.
_OWN = frozenset(vars(nn.Module())) | {"forward", "_compiled_call_impl", "__reduce_ex__", "__deepcopy__"}
PLAIN = (bool, int, float, complex, str, type(None))


@dataclass(frozen=True)
class _State:
    """One module as it was found."""

    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]
    buffers: dict[str, Any]
    submodules: dict[str, Any]
    sizes: dict[str, int]
    hooks: frozenset[int]


class ModuleStates:
    """How the modules of a model were found; kept no longer than a probe runs, for it holds them all."""

    def __init__(self, model: nn.Module) -> None:
        self._states = [
            _State(m, type(m), found := _attributes(m), dict(m._buffers), dict(m._modules), _sizes(found), _hooks(m))
            for m in model.modules()
        ]

    def is_untouched(self) -> bool:
        """Whether nothing stands in the place of another attribute, buffer or submodule now, and no list, set or dictionary among
        the attributes has grown or shrunk."""
        for state in self._states:
            now = _attributes(state.module)
            if _differ(now, state.attributes) or _sizes(now) != state.sizes:
                return False
            if _differ(state.module._buffers, state.buffers) or _differ(state.module._modules, state.submodules):
                return False
        return True

    def steered(self) -> bool:
        """Whether a number, flag or name among the attributes is another one now, or a submodule is: what can send the next
        run another way. A cached tensor does not."""
        return any(self._is_steered(state) for state in self._states)

    def _is_steered(self, state: _State) -> bool:
        now = _attributes(state.module)
        if {k: id(v) for k, v in state.submodules.items()} != {k: id(v) for k, v in state.module._modules.items()}:
            return True
        for name in state.attributes.keys() | now.keys():
            before, after = state.attributes.get(name), now.get(name)
            plain = isinstance(before, PLAIN) and isinstance(after, PLAIN)
            if plain and not (before is after or (type(before) is type(after) and before == after)):
                return True
        return False

    def put_back(self) -> None:
        """Make every module what it was. One that became of another class by its first run (lazy layers) stays that."""
        for state in self._states:
            for key in _hooks(state.module) - state.hooks:
                take_off(state.module, key)
            if type(state.module) is not state.kind:
                continue
            for name in _attributes(state.module).keys() - state.attributes.keys():
                state.module.__dict__.pop(name, None)
            own = state.module.__dict__
            own.update({k: v for k, v in state.attributes.items() if own.get(k, self) is not v})
            for now, before in ((state.module._buffers, state.buffers), (state.module._modules, state.submodules)):
                if _differ(now, before):
                    now.clear()
                    now.update(before)


def _differ(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() != before.keys() or any(now[k] is not before[k] for k in before)


def _sizes(attributes: Mapping[str, Any]) -> dict[str, int]:
    return {name: len(value) for name, value in attributes.items() if isinstance(value, (list, set, dict))}


def _hooks(module: nn.Module) -> frozenset[int]:
    """The numbers of the hooks that others than this package have put on a module. torch gives no number twice."""
    tables = (module._forward_pre_hooks, module._forward_hooks)
    return frozenset(key for table in tables if table for key, hook in list(table.items()) if not is_own(hook))


def _attributes(module: nn.Module) -> dict[str, Any]:
    if type(module).__module__.partition(".")[0] == "torch":
        return {}
    return {k: v for k, v in vars(module).items() if k not in _OWN}


@contextlib.contextmanager
def left_as_found(model: nn.Module) -> Iterator[ModuleStates]:
    """Whatever runs inside leaves no trace in the modules of `model`."""
    states = ModuleStates(model)

    def put_back() -> None:
        with closed_to_others():
            states.put_back()

    with restoring() as changes:
        changes.undo(put_back)
        yield states


_steering: weakref.WeakKeyDictionary[nn.Module, Mapping[str, Any]] = weakref.WeakKeyDictionary()


def steer_by(model: nn.Module, batch: Mapping[str, Any] | None) -> None:
    """Note a batch that sends `model` another way than it was found to go, or that there is none: see `steered_there`."""
    if batch is None:
        _steering.pop(model, None)
    else:
        _steering[model] = batch


def is_steered(model: nn.Module) -> bool:
    """Whether a batch is noted that sends `model` another way."""
    return model in _steering


def steered_there(model: nn.Module) -> None:
    """Bring the model where the user's own batch brings it, as one run of that batch would: hooks are put on the modules that
    will run. Call it within `left_as_found`."""
    batch = _steering.get(model)
    if batch is not None:
        with torch.no_grad():
            model(**batch)
