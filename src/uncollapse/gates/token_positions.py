"""Where each token of the running pass stands in its own sequence, told from outside the model's own code.

A module deep inside a model (a position gate) needs the true position of every token: counted from the first real token of
its sequence, across left padding and across what a key-value cache already holds. Hooks on the modules around the blocks
keep what those are called with; nothing is computed until a position is asked for. In this order:

1. `position_ids` [batch, token] or [token] (`decoder_position_ids` for a decoder), as given, less the offset that some models
   add to theirs (RoBERTa numbers from 2);
2. a two-dimensional `attention_mask`: the number of real tokens before the token, cut to the new tokens where a cache holds
   the past. Padded tokens get some position; nothing depends on it;
3. 0, 1, 2, …, counted on from what the cache holds. Patches of an image and frames of a sound count as they come.

Each pass of each thread has its own. Under the gradient checkpointing of transformers the positions of a pass go with its
checkpointed blocks, so that running them again in the backward pass gives what the forward pass gave.

When not to use this: a checkpoint of one's own (`torch.utils.checkpoint` around a block) hides which pass it repeats. It works
where no pass that could be repeated had other positions than 0, 1, 2, …, and is refused otherwise. Sequences laid end to
end without `position_ids` look like one sequence.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.errors import UnsupportedModel
from uncollapse.gates.position_features import Positions
from uncollapse.restoring import remove_hook


@dataclass(frozen=True)
class _Told:
    """What the running pass was told about the tokens of one stack: `past` tokens are in the cache. Not `certain`: it may
    have been meant for another stack. `known` are the positions found from it, by batch, tokens and device."""

    position_ids: Tensor | None = None
    mask: Tensor | None = None
    past: int = 0
    has_cache: bool = False
    is_certain: bool = True
    known: dict[tuple[int, int, torch.device], Positions] = field(default_factory=dict, init=False, repr=False)


@dataclass(frozen=True)
class _Reading:
    """How to read one module's arguments for one stack: the prefix of their names, whether its cache is that stack's, whether they
    can only be meant for it, and whether the module is itself inside the stack."""

    stack: str
    prefix: str = ""
    reads_cache: bool = True
    is_certain: bool = True
    is_inside: bool = False


class _Pass(threading.local):
    """What the pass that this thread is in was told. `depth` counts the hooked modules it is inside of; `is_whole` says that
    nothing it was told can be missing: the model itself runs, or a checkpoint that carried along what it had been told."""

    def __init__(self) -> None:
        self.depth = 0
        self.told: dict[str, _Told] = {}
        self.is_whole = False


class TokenPositions:
    """The positions in the running pass of one model. `offset` is what the model's own `position_ids` begin with. What runs in
    a pass stays out of compiled code, which would freeze what it met once."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self.is_plain = True  # no pass that can be repeated by a backward pass had other positions than 0, 1, 2, …
        self._pass = _Pass()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_pass"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _pass=_Pass())

    # Hooks --------------------------------------------------------------------------------------------------------
    def attach(self, model: nn.Module, stacks: Mapping[str, Sequence[str]]) -> None:
        """Listen to `model`, to every module around the blocks that `stacks` names, and to these. The stack named `decoder` reads
        the arguments named for it where a module holds the encoder, too."""
        stack_of = {block: stack for stack, blocks in stacks.items() for block in blocks}
        around = {"", *(name[:end] for name in stack_of for end in _dots(name))}
        for path in sorted({*around, *stack_of}):
            module = model.get_submodule(path)
            if path in stack_of:
                readings = [_Reading(stack_of[path], is_inside=True)]
            else:
                holds = [s for s, blocks in stacks.items() if any(_is_around(path, b) for b in blocks)]
                readings = [self._reading(stack, holds) for stack in holds]
            enter = _Entering(self, tuple(readings), _positional(module), is_model=not path)
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(self._leave, always_call=True)

    @staticmethod
    def _reading(stack: str, holds: Sequence[str]) -> _Reading:
        two_stacks = set(holds) == {"encoder", "decoder"}
        if two_stacks and stack == "decoder":
            return _Reading(stack, prefix="decoder_")
        return _Reading(stack, reads_cache=not two_stacks, is_certain=two_stacks or len(holds) == 1)

    def detach(self, model: nn.Module) -> None:
        """Take the hooks off, and what carries positions into checkpointed blocks."""
        for module in model.modules():
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
                if hook == self._leave or (isinstance(hook, _Entering) and hook.positions is self):
                    remove_hook(module, hook)
            checkpoint = vars(module).get("_gradient_checkpointing_func")
            if isinstance(checkpoint, _Carrying) and checkpoint.positions is self:
                vars(module)["_gradient_checkpointing_func"] = checkpoint.checkpoint

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def enter(
        self, module: nn.Module, given: Mapping[str, Any], readings: Sequence[_Reading], is_model: bool = False
    ) -> None:
        """A hooked module begins to run with the arguments `given`."""
        now = self._pass
        if is_model or now.depth == 0:  # Ctrl-C skips the hooks on the way out: the model itself starts afresh
            now.depth, now.told, now.is_whole = 0, {}, is_model
        for reading in readings:
            if not reading.is_inside or now.depth == 0:
                now.told[reading.stack] = _heard(now.told.get(reading.stack, _Told()), reading, given)
        now.depth += 1
        checkpoint = vars(module).get("_gradient_checkpointing_func")
        if checkpoint is not None and not isinstance(checkpoint, _Carrying):
            vars(module)["_gradient_checkpointing_func"] = _Carrying(self, checkpoint)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(self, *_: Any) -> None:
        self._pass.depth -= 1

    def told(self) -> dict[str, _Told]:
        """What the running pass was told so far."""
        return dict(self._pass.told)

    def repeat(self, told: dict[str, _Told], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `function` as a piece of the pass that was told `told`, in whatever thread."""
        now = self._pass
        before = now.depth, now.told, now.is_whole
        now.depth, now.told, now.is_whole = now.depth + 1, dict(told), True
        try:
            return function(*args, **kwargs)
        finally:
            now.depth, now.told, now.is_whole = before

    # Positions ----------------------------------------------------------------------------------------------------
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def now(self, stack: str, sequences: int, tokens: int, device: torch.device, can_repeat: bool) -> Positions:
        """The positions of the `tokens` tokens of `sequences` sequences that run through `stack` now. `can_repeat`: a backward pass
        may repeat this one.

        Raises `UnsupportedModel` where they cannot be known.
        """
        now = self._pass
        told = now.told.setdefault(stack, _Told()) if now.depth else _Told()
        key = sequences, tokens, device
        if key not in told.known:
            told.known[key] = self._found(told, sequences, tokens, device)
        found = told.known[key]
        if torch._C._current_graph_task_id() != -1:  # within a backward pass
            if not (self.is_plain or (now.depth and now.is_whole)):
                raise UnsupportedModel(
                    "gates: expected a backward pass that does not run a block again, or transformers' own gradient "
                    "checkpointing, got a block run by a checkpoint that does not say whose positions it repeats. Use "
                    "model.activation_checkpointing_enable(), or batches without left padding and position_ids."
                )
        elif can_repeat and found.start != 0:
            self.is_plain = False
        return found

    def _found(self, told: _Told, sequences: int, tokens: int, device: torch.device) -> Positions:
        if told.position_ids is None and told.mask is None and (told.is_certain or not told.past):
            return Positions.counted(told.past, tokens, device)
        if told.position_ids is not None:
            if not told.is_certain:
                raise _unknown("position_ids that may be meant for another part of the model")
            return self._given(told.position_ids, sequences, tokens, device)
        return self._from_mask(told, sequences, tokens, device)

    def _given(self, ids: Tensor, sequences: int, tokens: int, device: torch.device) -> Positions:
        fits = ids.ndim in (1, 2) and ids.shape[-1] == tokens and (ids.ndim == 1 or ids.shape[0] in (1, sequences))
        if not fits or ids.is_floating_point():
            raise _unknown(
                f"position_ids {str(ids.dtype).removeprefix('torch.')}{list(ids.shape)} for {sequences} sequences of "
                f"{tokens} tokens"
            )
        return Positions.of((ids.to(device).long() - self.offset).clamp(min=0))

    def _from_mask(self, told: _Told, sequences: int, tokens: int, device: torch.device) -> Positions:
        if told.mask is None:
            raise _unknown("a cache that may belong to another part of the model")
        mask, end = told.mask.to(device), told.past + tokens
        if bool(((mask != 0) & (mask != 1)).any()):  # an additive mask, or numbers of sequences laid end to end
            raise _unknown("an attention_mask with values other than 0 and 1, without position_ids")
        from_the_left = not bool((mask[:, 1:] > mask[:, :-1]).any())  # padding, if any, is on the right
        if from_the_left and (not told.past or (told.is_certain and bool(mask.all()))):
            return Positions.counted(told.past, tokens, device)
        fits = mask.shape[1] == end or (told.has_cache and mask.shape[1] > end)
        if not fits or mask.shape[0] not in (1, sequences) or not told.is_certain:
            raise _unknown(
                f"an attention_mask {list(mask.shape)} with padding on the left for {sequences} sequences of {tokens} tokens "
                f"after {told.past} in the cache"
            )
        return Positions.of((mask.long().cumsum(-1) - 1).clamp(min=0)[:, told.past : end])


@dataclass(frozen=True)
class _Entering:
    """The hook on the way into a module: an object, so that a deep copy of the model has its own."""

    positions: TokenPositions
    readings: tuple[_Reading, ...]
    names: tuple[str, ...]
    is_model: bool

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs} if args else kwargs
        self.positions.enter(module, given, self.readings, self.is_model)


@dataclass(frozen=True)
class _Carrying:
    """A module's checkpointing function that hands the pass's positions on to what it will run again."""

    positions: TokenPositions
    checkpoint: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        repeated = functools.partial(self.positions.repeat, self.positions.told(), function)
        return self.checkpoint(repeated, *args, **kwargs)


def _heard(told: _Told, reading: _Reading, given: Mapping[str, Any]) -> _Told:
    """What is known after a module was called with the arguments `given`: they go before what was heard further out."""
    if reading.is_certain and not told.is_certain:
        told = _Told()
    ids = given.get(f"{reading.prefix}position_ids")
    mask = given.get(f"{reading.prefix}attention_mask")
    heard = replace(told, is_certain=reading.is_certain)
    if isinstance(ids, Tensor):
        heard = replace(heard, position_ids=ids)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        heard = replace(heard, mask=mask)
    cache = next((v for v in given.values() if callable(getattr(v, "get_seq_length", None))), None)
    if reading.reads_cache and cache is not None:
        heard = replace(heard, past=int(cache.get_seq_length()), has_cache=True)
        if reading.is_inside:  # the blocks before this one may have written into it already
            heard = replace(heard, is_certain=heard.position_ids is not None or not heard.past)
    return heard


def _unknown(got: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"gates: expected to learn every token's position from position_ids[batch, token], or from attention_mask[batch, token] of "
        f"0 and 1 and the cache, got {got}. Pass position_ids, counted from 0 for the first real token of each sequence."
    )


def _dots(name: str) -> list[int]:
    return [i for i, character in enumerate(name) if character == "."]


def _is_around(path: str, name: str) -> bool:
    return path != name and (not path or name.startswith(f"{path}."))


def _positional(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's positional arguments."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # a forward written in C++
        return ()
    return tuple(p.name for p in parameters if p.kind in kinds)
