"""Put position gates around the output projections of a live model, and take them out again.

    gates = uc.install_gates(model)   # outputs unchanged, bit for bit
    ...train...
    uc.remove_gates(model)            # the very modules that were there

`projection` explains the gates, `token_positions` where the position of a token comes from. A cross-attention is gated by the
position of the decoder token, which receives. The gates work in training, `generate`, autocast, `copy.deepcopy` and
`state_dict`. Under `torch.compile` each of them breaks the compiled graph and runs eagerly.

When not to use it: if the attention computes its output projection in its own code (`nn.MultiheadAttention`), or sequences are
laid end to end without a token axis. Such models are refused. In your own model, use `PositionGatedProjection` directly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.proof import known_anatomy, known_example, proved_anatomy
from uncollapse.anatomy.streams import met
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.turns import refuse_running
from uncollapse.anatomy.vocabulary import Anatomy, Block, Layout, ModuleCall
from uncollapse.errors import InputError, UncollapseError, UnsupportedModel
from uncollapse.gates.projection import Features, Installed, PositionGatedProjection, dense_projection
from uncollapse.gates.token_positions import TokenPositions
from uncollapse.restoring import in_this_thread, leaves_no_trace, restoring
from uncollapse.wrappers import seen_through, takes


@dataclass
class _Place:
    """One output projection of the anatomy before it is wrapped."""

    heads: int
    stack: str
    token_axis: int
    calls: list[tuple[int, str]] = field(default_factory=list)
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)


def install_gates(
    model: nn.Module,
    *,
    batch: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    blocks: Collection[int] | None = None,
    positions: Features | nn.Embedding = "sinusoidal",
    position_width: int | None = None,
    max_positions: int = 512,
    perturbation: float = 0.0,
    seed: int = 0,
) -> dict[str, PositionGatedProjection]:
    """Put position gates around the output projection of every attention of `model`, in place. Returns them by name.

    batch: a batch to prove the anatomy on, if the model was not diagnosed before and has no dummy inputs.
    layout: for a model whose blocks cannot be told apart. blocks: block numbers from 0; all by default.
    positions, position_width, max_positions, perturbation, seed: as for `PositionGatedProjection`; each projection draws anew.

    With `perturbation=0` the outputs of the model do not change by a single bit; that is checked on a few tokens. A layer that
    several blocks share (ALBERT) has one gate for all of them. `token_positions` explains what counts as a token's position.
    To load a saved model: build the plain model, install the gates in the same way, then call `load_state_dict`.

    Raises `UnsupportedModel` if the anatomy cannot be proved, a projection is not a module of its own, or tokens cannot be told
    apart in its input; `InputError` if the model already has gates. The model is then left unchanged.
    """
    gated: dict[str, PositionGatedProjection] = {}
    told = TokenPositions()
    options = {
        "position_width": position_width,
        "positions": positions,
        "max_positions": max_positions,
        "perturbation": perturbation,
    }
    try:
        return _installed(model, batch, layout, blocks, options, seed, gated, told)
    except BaseException:  # Ctrl-C, too
        with restoring() as changes:
            changes.undo(functools.partial(_uninstalled, model, gated, told))
        raise


@leaves_no_trace
def _installed(
    model: nn.Module,
    batch: Mapping[str, Any] | None,
    layout: Layout | None,
    blocks: Collection[int] | None,
    options: Mapping[str, Any],
    seed: int,
    gated: dict[str, PositionGatedProjection],
    told: TokenPositions,
) -> dict[str, PositionGatedProjection]:
    """Fill `gated` and put it in place; `told` listens."""
    found = next((name for name, m in model.named_modules() if isinstance(m, PositionGatedProjection)), None)
    if found is not None:
        raise InputError(
            f"install_gates: expected a model without position gates, got {type(model).__name__} with them in {found}. They may "
            "have been installed before. Call remove_gates(model) first."
        )
    anatomy, example = _proved(model, batch, layout)
    places = _places(anatomy, _block_numbers(anatomy, blocks))
    with probing(model):
        _observe_shapes(model, example, anatomy, places)
        axes = {name: _token_axis(name, place) for name, place in places.items()}
        before = _outputs(model, example)
        told.offset = _position_offset(model, example)
    for number, (name, place) in enumerate(places.items()):
        gated[name] = PositionGatedProjection(
            model.get_submodule(name),
            place.heads,
            seed=seed + number,
            **options,
        )
        gated[name].installed = Installed(told, place.stack, axes[name], tuple(place.calls))
    _replace(model, {module.projection: module for module in gated.values()})
    told.attach(model, _stacks(anatomy))
    with probing(model):
        after = _outputs(model, example)
    same = len(before) == len(after) and all(map(torch.equal, before, after))
    if options["perturbation"] == 0 and not same:
        raise UnsupportedModel(
            f"install_gates: expected {type(model).__name__} with gates of 1 to give the outputs it gave, got others. It may "
            "look inside its output projections. Use PositionGatedProjection in the model's own code."
        )
    proved_anatomy(model, example, layout)
    return gated


def _uninstalled(model: nn.Module, gated: Mapping[str, PositionGatedProjection], *told: TokenPositions) -> None:
    """Put the original modules where gates were put, and take the hooks off."""
    _replace(model, {module: module.projection for module in gated.values()})
    for positions in told:
        positions.detach(model)
    for module in gated.values():
        module.installed = None


@leaves_no_trace
def remove_gates(model: nn.Module, *, fold: bool = False) -> None:
    """Remove the gates of `install_gates`. The original modules return, with their present weights.

    fold: multiply the gates into the weights first, so that the outputs stay the same up to rounding. This works if a gate is
    the same at every position, W_g phi = 0. If every gate is 1, no bit of the weights changes.

    Raises `InputError` if there are no gates, or some that cannot be folded. The model is then left unchanged.
    """
    gated = {n: m for n, m in model.named_modules() if isinstance(m, PositionGatedProjection) and m.installed}
    if not gated:
        raise InputError(
            f"remove_gates: expected a model that install_gates was applied to, got {type(model).__name__} without gates. "
            "Gates in the model's own code are not removed. There is nothing to do."
        )
    refuse_running("remove_gates", model)
    scales = {name: _constant_gates(model, name, module) for name, module in gated.items()} if fold else {}
    told = {id(m.installed.positions): m.installed.positions for m in gated.values() if m.installed is not None}
    weights = [dense_projection(gated[name].projection) for name in scales]
    before = [weight.detach().clone() for weight in weights]
    is_folded: list[bool] = []

    def end() -> None:
        if is_folded:
            _uninstalled(model, gated, *told.values())
            return
        with torch.no_grad():
            for weight, original in zip(weights, before, strict=True):
                weight.copy_(original)

    with restoring() as changes:
        changes.undo(end)
        with torch.no_grad():
            for weight, (name, scale) in zip(weights, scales.items(), strict=True):
                weight.mul_(scale.repeat_interleave(gated[name].head_width)[:, None])
        is_folded.append(True)  # from here on the gates go, whatever comes


def _proved(
    model: nn.Module, batch: Mapping[str, Any] | None, layout: Layout | None
) -> tuple[Anatomy, Mapping[str, Any]]:
    """The proved anatomy, and the few tokens it was proved on."""
    anatomy, example = known_anatomy(model), known_example(model)
    if anatomy is not None and example is not None and layout is None:
        return anatomy, example
    batch = getattr(seen_through(model), "dummy_inputs", None) if batch is None else batch
    if batch is None:
        raise InputError(
            f"install_gates: expected a model whose anatomy is known, got a {type(model).__name__} that was never diagnosed and "
            "has no dummy inputs. Pass batch={...}, a small input of the model."
        )
    anatomy = proved_anatomy(model, batch, layout)
    return anatomy, known_example(model) or batch


def _block_numbers(anatomy: Anatomy, blocks: Collection[int] | None) -> frozenset[int]:
    count = len(anatomy.blocks)
    if blocks is None:
        return frozenset(range(count))
    if isinstance(blocks, str) or not all(isinstance(b, int) and 0 <= b < count for b in blocks):
        raise InputError(
            f"install_gates: expected block numbers from 0 to {count - 1}, got {blocks!r}. "
            "Blocks are counted from 0, encoder first. Pass for example blocks=range(2, 4)."
        )
    return frozenset(blocks)


def _places(anatomy: Anatomy, blocks: Collection[int]) -> dict[str, _Place]:
    """The output projections to wrap, by name. Raises `UnsupportedModel` where one cannot be."""
    places: dict[str, _Place] = {}
    for number, block in enumerate(anatomy.blocks):
        for part in block.parts:
            for call in part.attention if number in blocks else ():
                where = f"block {number} ({part.module})"
                if not isinstance(call.projection, ModuleCall):
                    reason = "none" if call.projection is None else f"a product in its own code, {call.projection}"
                    raise _unsupported(f"an output projection that is a module of its own in {where}", reason)
                if block.axes is None:
                    raise _unsupported(f"one token axis in {where}", block.axes_reason)
                if block.axes.sequence is None or len(block.axes.token) != 1:
                    laid = "sequences laid end to end" if block.axes.sequence is None else "a grid of tokens"
                    raise _unsupported(f"one token axis in {where}", laid)
                stack = _stack_of(block)
                place = places.setdefault(call.projection.name, _Place(call.heads, stack, block.axes.within.token[0]))
                if (place.heads, place.stack) != (call.heads, stack):
                    reason = f"{call.projection.name} for {place.heads} heads in {place.stack}, too"
                    raise _unsupported(f"one projection for {call.heads} heads of {stack} in {where}", reason)
                if (number, part.kind) not in place.calls:
                    place.calls.append((number, part.kind))
    if not places:
        raise _unsupported("attention in the given blocks", "none")
    return places


def _stack_of(block: Block) -> str:
    """The stack's name: encoder or decoder, else that of the module that holds the block."""
    return block.stack or f"in {block.name.rpartition('.')[0]}"


def _stacks(anatomy: Anatomy) -> dict[str, list[str]]:
    stacks: dict[str, list[str]] = {}
    for block in anatomy.blocks:
        stacks.setdefault(_stack_of(block), []).append(block.name)
    return stacks


def _observe_shapes(
    model: nn.Module, example: Mapping[str, Any], anatomy: Anatomy, places: Mapping[str, _Place]
) -> None:
    """Note, in one pass, what shape each output projection's input has, beside that of the stream of its block."""
    stream: list[tuple[int, ...]] = [()]
    hooks: list[tuple[nn.Module, Callable[..., Any]]] = []

    def enter(found: Tensor) -> None:
        stream[0] = tuple(found.shape)

    for name, place in places.items():

        def note(_: nn.Module, args: Any, kwargs: Any, place: _Place = place) -> None:
            place.shapes.append((tuple(next(tensors_in([args, kwargs])).shape), stream[0]))

        hooks.append((model.get_submodule(name), in_this_thread(note)))
    with restoring() as changes:
        for module, hook in hooks:
            changes.hook(module, "forward_pre", hook, with_kwargs=True)
        with met(model, [(block.entry, enter) for block in anatomy.blocks]):
            model(**example)


def _token_axis(name: str, place: _Place) -> int:
    """Which axis of the projection's input counts the tokens of the stream."""
    axes = set()
    for given, stream in place.shapes:
        if len(given) == 3 and len(stream) == 3 and given[:2] == stream[:2]:
            axes.add(place.token_axis)
        elif len(given) == 3 and len(stream) == 3 and given[:2] == stream[1::-1]:
            axes.add(1 - place.token_axis)
        else:
            reason = f"{list(given)} where the stream is {list(stream)}"
            raise _unsupported(f"the tokens of the stream in what {name} reads, [batch, token, mixed]", reason)
    return axes.pop()


def _position_offset(model: nn.Module, example: Mapping[str, Any]) -> int:
    """What the model's own `position_ids` begin with: the number for the first token that changes no output when it is given.
    Some models count from behind their padding index."""
    tokens = example.get("input_ids")
    if not takes(model, "position_ids") or not isinstance(tokens, Tensor):
        return 0
    plain = {k: v for k, v in example.items() if k != "position_ids"}
    behind = {m.padding_idx + 1 for m in model.modules() if isinstance(m, nn.Embedding) and m.padding_idx is not None}
    expected = _outputs(model, plain)
    for offset in [0, *sorted(behind - {0})]:
        ids = torch.arange(offset, offset + tokens.shape[1], device=tokens.device)[None].expand(tokens.shape[:2])
        got = _outputs(model, {**plain, "position_ids": ids})
        if len(got) == len(expected) and all(map(torch.equal, expected, got)):
            return offset
    return 0


def _outputs(model: nn.Module, example: Mapping[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    return [t.detach().clone() for t in tensors_in(model(**example)) if t.is_floating_point()]


def _replace(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put each value wherever its key stands."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        around, _, last = name.rpartition(".")
        if module in new and model.get_submodule(around) is not new[module]:
            setattr(model.get_submodule(around), last, new[module])


def _unsupported(expected: str, got: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"install_gates: expected {expected}, got {got}. There the heads' outputs cannot be met one token at a time. Leave that "
        "block out with blocks=..., or use PositionGatedProjection in the model's own code."
    )


def _constant_gates(model: nn.Module, name: str, module: PositionGatedProjection) -> Tensor:
    """The gates [head] of a projection whose gates are the same at every position, and whose weight is nobody else's."""
    places = module.installed.places if module.installed else ()
    where = ", ".join(f"block {number}" for number, _ in places) + f" ({name})"
    rows = module.max_positions
    gates = module.gates(torch.arange(512 if rows is None else rows)).detach()
    constant = bool((gates == gates[0]).all()) and (rows is not None or not bool(module.gate.weight.any()))
    if not constant:
        variation = float((gates - gates[0]).abs().max())
        raise InputError(
            f"remove_gates: expected gates constant in position, got gates in {where} that vary by {variation:.3g}. Weights know "
            "no positions, so these cannot be folded. Keep the gates, or remove them with fold=False."
        )
    try:
        weight = dense_projection(module.projection)
    except UncollapseError as error:
        raise InputError(f"remove_gates: expected a dense projection to fold into, got {where}: {error}") from error
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p.data_ptr() == weight.data_ptr()]
    if len(names) > 1 and not bool((gates == 1).all()):
        raise InputError(
            f"remove_gates: expected a weight used only by {where}, got one that is also {names[1]}. Folding would change both. "
            "Keep the gates."
        )
    return gates[0].to(weight)
