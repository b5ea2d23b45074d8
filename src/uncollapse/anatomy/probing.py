"""How a model is run to be looked at: in evaluation mode, from one seed, in one number format."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from uncollapse.anatomy.autocast import no_casts_kept
from uncollapse.anatomy.module_states import is_steered, left_as_found, steered_there
from uncollapse.anatomy.sharded_weights import gathered_weights
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.turns import closed_to_others, own_thread, watch
from uncollapse.restoring import restoring, run_eagerly, run_layers_openly, turn


@contextlib.contextmanager
def probing(model: nn.Module, seed: int = 0, *, leaves_traces: bool = False) -> Iterator[None]:
    """Run `model` as a probe: evaluation mode, no gradients, no key-value cache, no compiled code, a fixed seed. All of it is
    put back, and so is what the runs inside leave behind in the modules (`module_states`), unless it `leaves_traces`.

    A compiled model keeps its compiled code but does not run it here: hooks added after the first compiled call would
    never fire. torch's own `nn.TransformerEncoderLayer` fuses the whole layer into one kernel in evaluation mode; nobody
    can look inside it, so it takes its ordinary path here, which differs from the fused one in the last digit.
    """
    # A seed is given to all of them, whichever the model is on.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with turn, restoring(gathers=True) as changes:
        watch(model, _caches)
        if _is_another_when_probed(model):
            changes.enter(closed_to_others())
        for device in devices:
            state = torch.cuda.get_rng_state(device)
            changes.undo(functools.partial(torch.cuda.set_rng_state, state, device))
        changes.undo(functools.partial(torch.set_rng_state, torch.get_rng_state()))
        seed_all(seed)
        changes.switch(torch.is_grad_enabled, torch.set_grad_enabled, False)
        changes.enter(no_casts_kept())
        if not leaves_traces:
            changes.enter(left_as_found(model))
        run_eagerly.hold(changes)
        run_layers_openly.hold(changes)
        changes.enter(in_the_open(model))
        changes.enter(gathered_weights(model))
        for module in model.modules():
            if module.training:
                changes.set(module, "training", False)
            if isinstance(module, nn.parallel.DistributedDataParallel):  # not every process need run it as often
                changes.set(module, "require_forward_param_sync", False)
                changes.set(module, "require_backward_grad_sync", False)
        # A block run twice on its own arguments would find its own keys in the cache.
        for config in configurations(model):
            if getattr(config, "use_cache", False) is True:
                changes.set(config, "use_cache", False)
        steered_there(model)
        yield


def seed_all(seed: int) -> None:
    """`torch.manual_seed` for the devices that are in use. For one that is not, that would note down where it was called from,
    which in the middle of a model costs more than a small block does; a device that nothing runs on draws no numbers."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.xpu.is_initialized():
        torch.xpu.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@contextlib.contextmanager
def own_random_numbers() -> Iterator[None]:
    """Within the block random numbers may be drawn: whoever draws the next ones afterwards gets those that he would have got."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield


def output_of(model: nn.Module, batch: Mapping[str, Any]) -> list[Tensor]:
    """What a model that is being probed gives on a batch, from the seed 0: its floating tensors, copied."""
    seed_all(0)
    return tensors_of(model(**batch))


def tensors_of(output: Any) -> list[Tensor]:
    """The floating tensors in what a model gives, copied."""
    return [t.detach().clone() for t in tensors_in(output) if t.is_floating_point()]


def _caches(module: nn.Module) -> bool:
    """Whether calls of a module keep a cache because its configuration says so."""
    return getattr(getattr(module, "config", None), "use_cache", False) is True


def _is_another_when_probed(model: nn.Module) -> bool:
    """Whether a pass of another thread would give other outputs, or other bits, while `probing` has the model: it would be out
    of training mode, out of compiled code, or out of code that a probe cannot look into."""
    fuses = torch.backends.mha.get_fastpath_enabled()
    return bool(hidden(model)) or any(
        m.training
        or "_orig_mod" in m._modules
        or m._compiled_call_impl is not None
        or (fuses and isinstance(m, (nn.MultiheadAttention, nn.TransformerEncoderLayer)))
        for m in model.modules()
    )


def configurations(model: nn.Module) -> list[Any]:
    """The configurations of a model's modules, each once."""
    return list({id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values())


@contextlib.contextmanager
def in_the_open(model: nn.Module) -> Iterator[None]:
    """Within the block a model computes the same function where it can be seen: a feed-forward that runs on a few tokens at a
    time to save memory (`chunk_size_feed_forward`) runs on all at once, so that it adds to the stream in one place, and
    `flex_attention`, one opaque call, becomes the model's own eager attention."""
    with restoring() as changes:
        for owner, name, value in hidden(model):
            changes.set(owner, name, value)
        yield


def hidden(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """What `in_the_open` changes: on which object, which attribute, and to what."""
    found: list[tuple[Any, str, Any]] = [
        (m, "chunk_size_feed_forward", 0) for m in model.modules() if getattr(m, "chunk_size_feed_forward", 0)
    ]
    for config in configurations(model):
        if getattr(config, "_attn_implementation", None) == "flex_attention":
            found.append((config, "_attn_implementation", "eager"))
    return found


@contextlib.contextmanager
def going_as_steered(model: nn.Module) -> Iterator[None]:
    """Within the block the model goes where the batch that it was proved on sends it, so that the modules that will run are the
    ones met here. Does nothing where running a batch changes nothing."""
    with restoring() as changes:
        if is_steered(model):
            changes.enter(left_as_found(model))
            with probing(model, leaves_traces=True):
                pass
        yield


def full_precision(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Within the block a measurement of `tensor` is computed as it is written, also when the model runs under autocast."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


@contextlib.contextmanager
def measuring(tensor: Tensor) -> Iterator[None]:
    """Within the block a measurement of `tensor` is computed as it is written, and no gradient flows back from it, also when the
    pass is one of training."""
    with torch.no_grad(), full_precision(tensor):
        yield


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
    thread = own_thread()

    def around(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)  # others read the signature: does it take position_ids?
        def forward(*args: Any, **kwargs: Any) -> Any:
            if own_thread() != thread:
                return original(*args, **kwargs)
            with _Float64Kept():
                return original(*args, **kwargs)

        return forward

    with restoring() as changes:
        changes.wrap(model, around)
        yield
