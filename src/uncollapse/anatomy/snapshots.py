"""Copies of what a module was called with, to call it with the same again.

A forward may write into its arguments: additions in place, a cache of keys that grows by each run. The copies have tensors,
containers and objects of their own; modules and configurations, and the parameters in such objects, are those of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.module_states import PLAIN

_UNCHANGED = (*PLAIN, torch.dtype, torch.device, nn.Module)


def copied(value: Any, model: nn.Module) -> Any:
    """`value` with every tensor in it copied and detached, and every object around one. `model` is whose argument it was: what
    it holds itself stays what it is.

    Objects that cannot be copied are handed on as they are.
    """
    return _copied(value, model, {})


def _copied(value: Any, model: nn.Module, memo: dict[int, Any]) -> Any:
    if isinstance(value, _UNCHANGED):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor):
        result: Any = value.detach().clone()
    elif type(value) in (list, tuple):
        result = type(value)(_copied(v, model, memo) for v in value)
    elif type(value) is dict:
        result = {k: _copied(v, model, memo) for k, v in value.items()}
    elif _holds_tensor(value, set()):
        configurations = (getattr(m, "config", None) for m in model.modules())
        for own in (*model.modules(), *model.parameters(), *configurations):
            memo[id(own)] = own
        try:
            result = copy.deepcopy(value, memo)
        except Exception:  # whatever an object of somebody else's says to being copied
            result = value
    else:
        result = value
    memo[id(value)] = result
    return result


def _holds_tensor(value: Any, seen: set[int]) -> bool:
    """Whether a tensor is somewhere in a container or among the attributes of an object."""
    if isinstance(value, Tensor):
        return True
    if isinstance(value, (*_UNCHANGED, type)) or id(value) in seen or callable(value):
        return False
    seen.add(id(value))
    inside: Any = vars(value).values() if hasattr(value, "__dict__") else ()
    if isinstance(value, Mapping):
        inside = [*inside, *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = [*inside, *value]
    return any(_holds_tensor(v, seen) for v in inside)
