"""Where a value of the graph is met in a running model, and what to say where no blocks can be read."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from uncollapse.anatomy.reading_attention import Attentions
from uncollapse.anatomy.reading_sums import walked
from uncollapse.anatomy.tracing import Call
from uncollapse.anatomy.vocabulary import (
    Layout,
    ModuleCall,
    Place,
)
from uncollapse.errors import UnsupportedModel
from uncollapse.restoring import is_own

SIDE_BY_SIDE = "several streams side by side"  # as messages call them


class Refusals(Attentions):
    """Places of values in the running model, and refusals that say what was found instead of blocks."""

    def _place(self, index: int, around: Call) -> Place:
        """Where a value can be met that is made in, or given to, the code of the module that runs in `around`."""
        for path, given in around.inputs.items():
            if given == index:
                return Place(ModuleCall(around.name, around.ordinal), "in", path)
        # What a module makes is met where it leaves it: hooks may put another value in its place.
        for call in self.t.calls:
            inside = around.first <= call.first and call.index != around.index and call.first <= index < call.last
            if inside and call.outputs.get(None) == index:
                return Place(ModuleCall(call.name, call.ordinal), "out")
        node = self.t.nodes[index]
        made = [
            n.index for n in self.t.nodes if n.ordinal == node.ordinal and self._point(n.index) == self._point(index)
        ]
        if node.operation not in {"batch", "parameter", "constant"}:
            return Place(self._point(index), "out", (made.index(index),) if len(made) > 1 else ())
        for call in self.t.calls:
            for key, given in call.outputs.items():
                if given == index:
                    return Place(ModuleCall(call.name, call.ordinal), "out", key or ())
        raise self._refusal(
            f"the residual stream in {around.name or 'the model itself'} begins with a constant of its own"
        )

    def _in_hooks(self, call: Call) -> str:
        """Names the modules in a block that a user's own forward hook stands on."""
        hooked = [
            c.name
            for c in self.t.calls
            if c.first >= call.first and c.last <= call.last and has_own_hooks(self.model.get_submodule(c.name))
        ]
        if not hooked:
            return ""
        return (
            f"; a forward hook of yours stands on {', '.join(dict.fromkeys(hooked))}, and may change what passes there"
        )

    def _found(self) -> str:
        def places(indices: Iterable[int]) -> str:
            owners = (self.t.calls[self.t.nodes[i].call].name or "the model itself" for i in indices)
            return ", ".join(list(dict.fromkeys(owners))[:4]) or "no module"

        return (
            f"{len(self.attentions)} attention calls (in {places(self.attentions)}) and "
            f"{len(self.sums)} residual additions (in {places(s.root for s in self.sums)})"
        )

    def _layout(self, refused: Layout | None) -> str:
        """A layout to start from; none where it would be the one that was just refused."""
        owners = [self.t.calls[self.t.nodes[i].call].name for i in self.attentions]
        blocks = _block_candidates(self.model, owners)
        return (
            "" if not blocks or (refused is not None and refused.blocks == blocks) else f"uc.Layout(blocks={blocks!r})"
        )

    def _several_streams(self) -> str | None:
        """Where what an attention makes is added to more than one value, or to one of more axes: streams side by side."""
        for product in self.attentions:
            made = self._projection(product)
            sums: set[int] = set()

            def moved_on(index: int, sums: set[int] = sums) -> list[int]:
                consumers = set(self.t.consumers[index])
                added = {i for i in consumers if self.t.nodes[i].operation == "add" and len(self.t.nodes[i].inputs) > 1}
                sums |= added
                return [i for i in consumers - added if self._passes(i) == index]

            for _ in walked([] if made is None else [made], moved_on):
                pass
            if len(sums) > 1 or any(self.t.nodes[i].size > self.t.nodes[made].size for i in sums if made is not None):
                return self.t.calls[self.t.nodes[product].call].name or "the model itself"
        return None

    def _opaque_attention(self) -> str | None:
        """The name of an attention call of another kind than `scaled_dot_product_attention`, where one was met."""
        fused = [n.operation for n in self.t.nodes if "attention" in n.operation or "attn" in n.operation]
        return next((name for name in fused if name != "scaled_dot_product_attention"), None)

    def _refusal(self, reason: str) -> UnsupportedModel:
        found, layout = self._found(), self._layout(self.layout)
        advice = f"Pass layout={layout}." if layout else "No layout helps here: it would be read in the same way."
        opaque = self._opaque_attention()
        if opaque:
            reason = f"{opaque} is one opaque call, and what it mixes by cannot be seen"
            layout, advice = "", "Load the model with attn_implementation='sdpa' or 'eager'."
        elif (several := self._several_streams()) is not None:
            reason = f"what the attention in {several} makes is added to {SIDE_BY_SIDE} (hyper-connections)"
            layout, advice = (
                "",
                "They are measured where they are one tensor and are mixed by products; no layout helps.",
            )
        return UnsupportedModel(
            f"anatomy: expected a Transformer whose blocks can be told apart, got {type(self.model).__name__}: {reason}. "
            f"Found {found}. {advice}",
            found=found,
            identity=reason,
            layout=layout,
        )


def _block_candidates(model: nn.Module, attention: Iterable[str]) -> tuple[str, ...]:
    """The members of the longest list of like modules, preferably one that holds attention: what a user would call blocks."""
    best: tuple[bool, int, tuple[str, ...]] = (False, 0, ())
    for name, module in model.named_modules():
        children = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len({type(c) for c in module.children()}) == 1:
            attends = any(f"{owner}.".startswith(f"{child}.") for owner in attention for child in children)
            if (attends, len(children)) > best[:2]:
                best = (attends, len(children), tuple(children))
    return best[2]


def has_own_hooks(module: nn.Module) -> bool:
    """Whether somebody else's forward hooks stand on a module."""
    return not all(map(is_own, (*module._forward_hooks.values(), *module._forward_pre_hooks.values())))
