"""Ctrl-C at every line of given modules, one line at a time, and how a model and the process stand before and after."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers as hf
from torch import nn

Line = tuple[str, int]
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


BATCH = {"input_ids": torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(0))}


def llama() -> nn.Module:
    """One block in training mode, which keeps a cache: both have to come back."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return hf.LlamaModel(config).train()


def standing(model: nn.Module) -> dict[str, Any]:
    """All that a probe could leave behind: in a model, and in torch's settings."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = vars(module)
        found[name] = (
            type(module),
            module.training,
            sorted(k for k in own if k not in _HOOKS),
            own.get("forward"),
            [list(own[table].items()) for table in _HOOKS],
            [(k, id(p), p.detach().clone().view(-1).tolist()) for k, p in module._parameters.items() if p is not None],
            [(k, id(b)) for k, b in module._buffers.items()],
            getattr(getattr(module, "config", None), "use_cache", None),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
    found["process"] = (
        torch.is_grad_enabled(),
        torch._dynamo.eval_frame._stance.stance,
        torch.backends.mha.get_fastpath_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch._C._len_torch_function_stack(),
        torch._C._is_torch_function_mode_enabled(),
        torch.get_rng_state().tolist(),
    )
    return found


def lines_of(modules: list[types.ModuleType], operation: Callable[[], object]) -> dict[Line, int]:
    """How often each line of the modules runs in the operation."""
    counts: dict[Line, int] = {}
    with _traced(modules, lambda line: counts.__setitem__(line, counts.get(line, 0) + 1)):
        operation()
    return counts


def interruptions(
    modules: list[types.ModuleType], operation: Callable[[], object], reverse: Callable[[], object] = lambda: None
) -> Iterator[tuple[Line, BaseException | None]]:
    """Run the operation again and again, each time with Ctrl-C at another line of the modules: where it runs first, and last.
    `reverse` takes back what the operation does when it is not interrupted."""
    operation()  # the first time is another: what is proved then is remembered
    reverse()
    counts = lines_of(modules, operation)
    reverse()
    for line, count in counts.items():
        for wanted in sorted({1, count}):
            yield line, _interrupted(modules, operation, line, wanted)


def _interrupted(
    modules: list[types.ModuleType], operation: Callable[[], object], line: Line, wanted: int
) -> BaseException | None:
    met = 0

    def at(here: Line) -> None:
        nonlocal met
        if here == line:
            met += 1
            if met == wanted:
                raise KeyboardInterrupt

    try:
        with _traced(modules, at):
            operation()
    except KeyboardInterrupt as raised:
        return raised.with_traceback(None)
    return None


class _traced:  # noqa: N801 - reads as a verb; a class, for a generator of `contextlib` would be traced too
    def __init__(self, modules: list[types.ModuleType], at: Callable[[Line], None]) -> None:
        self.files = {m.__file__ for m in modules}
        self.at = at

    def __enter__(self) -> None:
        sys.settrace(self.call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def call(self, frame: types.FrameType, event: str, _: Any) -> Any:
        return self.line if frame.f_code.co_filename in self.files else None

    def line(self, frame: types.FrameType, event: str, _: Any) -> Any:
        if event == "line":
            self.at((frame.f_code.co_filename, frame.f_lineno))
        return self.line


def interrupted_at(modules: list[types.ModuleType], operation: Callable[[], object], number: int) -> None:
    """Run the operation, with Ctrl-C at the line of this number, counted over all lines of the modules that run."""
    met = 0

    def at(_: Line) -> None:
        nonlocal met
        met += 1
        if met == number:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt), _traced(modules, at):
        operation()
