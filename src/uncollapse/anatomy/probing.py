"""How a model is run to be looked at: in evaluation mode, from one seed, in one number format."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from uncollapse.anatomy.autocast import no_casts_kept
from uncollapse.anatomy.interception import mark_own_wrapping
from uncollapse.anatomy.module_states import is_steered, left_as_found, steered_there


@contextlib.contextmanager
def probing(model: nn.Module, seed: int = 0, *, leaves_traces: bool = False) -> Iterator[None]:
    """Run `model` as a probe: evaluation mode, no gradients, no key-value cache, no compiled code, a fixed seed. All of it is
    put back, and so is what the runs inside leave behind in the modules (`module_states`), unless it `leaves_traces`.

    A compiled model keeps its compiled code but does not run it here: hooks added after the first compiled call would
    never fire. torch's own `nn.TransformerEncoderLayer` fuses the whole layer into one kernel in evaluation mode; nobody
    can look inside it, so it takes its ordinary path here, which differs from the fused one in the last digit.
    """
    training = [m for m in model.modules() if m.training]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        torch.manual_seed(seed)
        stack.enter_context(torch.no_grad())
        stack.enter_context(no_casts_kept())
        if not leaves_traces:
            stack.enter_context(left_as_found(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(in_the_open(model))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for module in training:
            module.training = False
        for config in caching:  # a block run twice on its own arguments would find its own keys in the cache
            config.use_cache = False
        try:
            steered_there(model)
            yield
        finally:
            for module in training:
                module.training = True
            for config in caching:
                config.use_cache = True


@contextlib.contextmanager
def in_the_open(model: nn.Module) -> Iterator[None]:
    """Within the block a model computes the same function where it can be seen: a feed-forward that runs on a few tokens at a
    time to save memory (`chunk_size_feed_forward`) runs on all at once, so that it adds to the stream in one place, and
    `flex_attention`, one opaque call, becomes the model's own eager attention."""
    changed: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        if getattr(module, "chunk_size_feed_forward", 0):
            changed.append((module, "chunk_size_feed_forward", 0))
    for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        if getattr(config, "_attn_implementation", None) == "flex_attention":
            changed.append((config, "_attn_implementation", "eager"))
    before = [getattr(owner, name) for owner, name, _ in changed]
    for owner, name, value in changed:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), value in zip(changed, before, strict=True):
            setattr(owner, name, value)


@contextlib.contextmanager
def going_as_steered(model: nn.Module) -> Iterator[None]:
    """Within the block the model goes where the batch that it was proved on sends it, so that the modules that will run are the
    ones met here. Does nothing where running a batch changes nothing."""
    with contextlib.ExitStack() as stack:
        if is_steered(model):
            stack.enter_context(left_as_found(model))
            with probing(model, leaves_traces=True):
                pass
        yield


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Within the block a measurement of `tensor` is computed as it is written, also when the model runs under autocast."""
    return torch.autocast(tensor.device.type, enabled=False)


class _Float64Kept(TorchFunctionMode):
    """Requests for single precision are requests for double."""

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        given = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*(torch.float64 if a is torch.float32 else a for a in args), **given)


@contextlib.contextmanager
def float64_kept(model: nn.Module) -> Iterator[None]:
    """Keep a float64 model in float64: many models cast to single precision inside their norms, rotary embeddings and
    softmax, which puts the floor of every figure at 1e-7. A model in another number format is left as it is."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtypes != {torch.float64}:
        yield
        return
    original, own = model.forward, "forward" in model.__dict__

    @functools.wraps(original)  # others read the signature: does it take position_ids?
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Float64Kept():
            return original(*args, **kwargs)

    mark_own_wrapping(forward)
    model.forward = forward
    try:
        yield
    finally:
        if own:
            model.forward = original
        else:
            del model.forward
