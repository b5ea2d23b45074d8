"""Read an anatomy off a recorded graph: residual additions first, then parts, norms, projections and blocks.

Each step is a module, and builds on the one before: `reading_sums`, `reading_norms`, `reading_attention`, `reading_refusals`,
`reading_parts`, `reading_stretches`, and here the blocks. What they say is in the words of `vocabulary`. Nothing is believed until
`proof` has checked it on the live model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import nn

from uncollapse.anatomy.interception import Point
from uncollapse.anatomy.reading_refusals import SIDE_BY_SIDE
from uncollapse.anatomy.reading_stretches import Stretch, Stretches
from uncollapse.anatomy.reading_sums import Sum, walked
from uncollapse.anatomy.tracing import Trace
from uncollapse.anatomy.vocabulary import (
    STREAM,
    AdditionNode,
    Anatomy,
    Block,
    Layout,
    ModuleCall,
    Part,
    Place,
    Placement,
    Residual,
    Stack,
)

_CUTS = frozenset(["getitem", "split", "chunk", "narrow", "tensor_split", "unbind"])


def read(model: nn.Module, recorded: Trace, layout: Layout | None = None, *, several: bool = False) -> Anatomy:
    """The picture that the graph shows; not yet proved. several: streams side by side are looked for, which sublayers read and
    write together. Raises `UnsupportedModel` where no blocks can be made out."""
    reader = _Reader(model, recorded, several=several)
    if several and not any(found.read is not None for found in reader.sums):
        raise reader._refusal(f"no sublayer reads {SIDE_BY_SIDE}")
    blocks = tuple(reader.blocks(layout))
    return Anatomy(blocks, reader.outer_norms(blocks), stacks=reader.stacks(blocks))


class _Reader(Stretches):
    def blocks(self, layout: Layout | None) -> list[Block]:
        self.layout = layout
        stretches = self._stretches(layout)
        if not stretches:
            raise self._refusal("no module call that holds one self-attention and its residual addition")
        stacks: list[Literal["encoder", "decoder"] | None] = [None] * len(stretches)
        if layout is not None and layout.stacks:
            by_name = dict(zip(layout.blocks, layout.stacks, strict=True))
            stacks = [by_name[s.name] for s in stretches]
        blocks = [self._block(stretch, s) for stretch, s in zip(stretches, stacks, strict=True)]
        self._require_own_attention(blocks)
        if layout is None:
            self._require_every_attention(blocks)
        if layout is None or not layout.stacks:
            blocks = self._with_stacks(blocks, stretches)
        return blocks

    def _require_own_attention(self, blocks: list[Block]) -> None:
        """Refuse a picture in which several blocks hold one and the same attention: it is added to several streams."""
        met: dict[Point, str] = {}
        for block in blocks:
            for product in {c.product for p in block.parts for c in p.attention}:
                if product in met:
                    raise self._refusal(
                        f"the attention in {product.owner} is that of {met[product]} and of {block.name}"
                    )
                met[product] = block.name

    def _require_every_attention(self, blocks: list[Block]) -> None:
        """Refuse a picture that leaves out a block: attention inside a module of a class that is a block elsewhere, or, of a
        kind that blocks have, inside a member of a list. A pooling head's may stand outside the blocks. What reaches nothing that
        the model returns, such as the state that a recurrent layer would hand on to a next text, is nobody's."""
        inside = {c.product for b in blocks for p in b.parts for c in p.attention}
        kinds = {type(self.model.get_submodule(point.owner)) for point in inside}
        classes = {type(self.model.get_submodule(b.module.name)) for b in blocks if not b.label}
        for product in self.attentions:
            point = self._point(product)
            if point in inside or not any(self.t.depends(result, product) for result in self.t.results):
                continue
            names = [self.t.calls[i].name for i in self.t.call_path(self.t.nodes[product].call) if self.t.calls[i].name]
            of_a_kind = type(self.model.get_submodule(point.owner)) in kinds and any(map(self._is_listed, names))
            if of_a_kind or any(type(self.model.get_submodule(n)) in classes for n in names):
                raise self._refusal(
                    f"the attention in {point.owner or 'the model itself'} belongs to no block that was found"
                )

    def _with_stacks(self, blocks: list[Block], stretches: list[Stretch]) -> list[Block]:
        """Encoder and decoder, told by cross-attention: a group whose blocks cross is a decoder, what it reads an encoder."""
        crossing = {s.group for b, s in zip(blocks, stretches, strict=True) if any(p.kind == "cross" for p in b.parts)}
        if not crossing:
            return blocks
        return [
            replace(b, stack="decoder" if s.group in crossing else "encoder")
            for b, s in zip(blocks, stretches, strict=True)
        ]

    def stacks(self, blocks: tuple[Block, ...]) -> tuple[Stack, ...]:
        """The chains of blocks that hand a stream on, in the order in which they begin."""
        entries, exits = zip(*(self.edges[b.entry, b.exit] for b in blocks), strict=True)
        chains: list[list[int]] = []
        for number, entry in enumerate(entries):
            given = next((i for i in reversed(range(number)) if self._hands_on(exits[i], entry)), None)
            known = next((chain for chain in chains if given in chain), None)
            if known is None:
                chains.append([number])
            else:
                known.append(number)
        return tuple(Stack(blocks[chain[0]].stack, tuple(chain)) for chain in chains)

    def _hands_on(self, left: int, entered: int) -> bool:
        """Whether the stream that leaves a block is the one that enters another: moved, scaled or added to without a learned
        product on the way, or the only data that the entering one is made of (as where patches are merged)."""
        if left != entered and not self.t.depends(entered, left):
            return False
        dominates, carries = True, False

        def onward(at: tuple[int, bool]) -> list[tuple[int, bool]]:
            index, is_learned = at
            behind = [] if index == left else self._data(self.t.nodes[index].inputs)
            return [(i, is_learned or self.t.is_matrix_product(index)) for i in behind]

        for index, is_learned in walked([(i, False) for i in self._data([entered])], onward):
            if index == left:
                carries |= not is_learned
            else:
                dominates &= bool(self._data(self.t.nodes[index].inputs))
        return dominates or carries

    def _block(self, stretch: Stretch, stack: Literal["encoder", "decoder"] | None) -> Block:
        call, sums = stretch.call, stretch.sums
        if not sums:
            raise self._refusal(f"no residual addition inside {stretch.name}")
        if call.outputs == {} and call.written == {} and stretch.exit is None and call.index:
            raise self._refusal(f"no tensor among the outputs of {stretch.name}")
        parts: list[Part] = []
        residuals: list[Residual] = []
        parts_of: list[list[int]] = []
        # By addition: the ways of the stream, from their ends to their beginnings.
        carried: list[list[tuple[int, int]]] = []
        entry, entry_value = self._entry(stretch)
        exit_place, exit_value = self._exit(stretch)
        before = entry_value
        for found in sums:
            own, tree = self._group(found)
            offset = len(parts)
            numbers = {STREAM: STREAM} | {i: i + offset for i in range(len(own))}
            tree = [
                AdditionNode(n.point, tuple(frozenset(numbers[i] for i in leaves) for leaves in n.leaves)) for n in tree
            ]
            summands = [leaf for leaf in found.leaves if leaf != found.stream]
            attending = bool(own) and own[0].kind in {"attention", "cross"}
            parts_of.append(
                [offset if not attending or self._attending(leaf, found.stream) else offset + 1 for leaf in summands]
            )
            carried.append([(found.stream, before), (found.root, found.stream)])
            if found.read is not None:  # the weights that it is read by, too
                carried[-1].append((found.read, found.stream))
            if found is sums[-1]:
                carried[-1].append((exit_value, found.root))
            elif self._is_piecewise(found, sums[len(residuals) + 1]):
                raise self._refusal(
                    f"a sublayer of {stretch.name} runs on some of the tokens at a time, one piece after another. How many "
                    "pieces there are depends on the input. Let it run on all tokens at once"
                )
            residuals.append(Residual(tuple(tree), tuple(range(offset, offset + len(own)))))
            parts.extend(own)
            before = found.root
        region = call if stretch.entry is None else replace(call, first=entry_value + 1, last=exit_value + 1)
        norms = self._norms(sums, parts_of, exit_value, region)
        for part, points in self.last_products(sums, parts_of).items():
            parts[part] = replace(parts[part], last_products=points)
        self.edges[entry, exit_place] = (entry_value, exit_value)
        inside = [self.t.pieces[n.where] for n in norms if n.role == "post" and n.where in self.t.pieces]
        residuals = [
            replace(
                r,
                norms_post=tuple(n.where for n in norms if n.role == "post" and n.place == i),
                gates=tuple(dict.fromkeys(gate for way in carried[i] for gate in self._gates(*way, inside))),
            )
            for i, r in enumerate(residuals)
        ]
        roles = {n.role for n in norms}
        placement: Placement = (
            "post"
            if "post" in roles
            else "sandwich"
            if {"before", "after"} <= roles
            else "pre"
            if "before" in roles
            else "output"
            if "after" in roles
            else "none"
        )
        return Block(
            ModuleCall(call.name, call.ordinal),
            stack,
            placement,
            tuple(parts),
            tuple(residuals),
            tuple(norms),
            entry,
            exit_place,
            label=stretch.label,
        )

    def _is_piecewise(self, found: Sum, following: Sum) -> bool:
        """Whether two sums that follow each other stand side by side on pieces of one stream."""
        beside = not self._feeds(found.root, following.stream) and self.t.nodes[found.stream].operation in _CUTS
        origins = [self.t.nodes[s.stream] for s in (found, following)]
        return beside and (origins[0].operation, origins[0].inputs) == (origins[1].operation, origins[1].inputs)

    def _entry(self, stretch: Stretch) -> tuple[Place, int]:
        """Where the stream enters the block, and the value there: the latest of the block's arguments that the stream of the
        first addition is, or carries."""
        call, stream = stretch.call, stretch.sums[0].stream
        if stretch.entry is not None:
            return self._place(stretch.entry, call), stretch.entry
        at = ModuleCall(call.name, call.ordinal)
        for path, index in call.inputs.items():
            if index == stream or self._moved(stream, index):
                return Place(at, "in", path), index
        carried = self._carried(stream, tuple(call.inputs.values()))
        given = [(index, path) for path, index in call.inputs.items() if index in carried]
        if not given:
            raise self._refusal(
                f"the residual stream of {stretch.name} is none of its arguments (it is the result of "
                f"{self.t.nodes[stream].operation}{self._in_hooks(call)})"
            )
        index, path = max(given, key=lambda found: found[0])
        return Place(at, "in", path), index

    def _exit(self, stretch: Stretch) -> tuple[Place, int]:
        """Where the stream leaves the block, and the value there: preferably one that carries the last addition unchanged, or
        is at least of its size."""
        call, last = stretch.call, stretch.sums[-1]
        if stretch.exit is not None:
            return self._place(stretch.exit, call), stretch.exit
        at, size = ModuleCall(call.name, call.ordinal), self.t.nodes[self._summed(last.root)].size
        places: list[tuple[Place, int]] = [(Place(at, "out", path or ()), i) for path, i in call.outputs.items()]
        places += [(Place(at, "written", path), i) for path, i in call.written.items()]
        reached = [(p, i) for p, i in places if self._feeds(last.root, i)]
        carrying = [(p, i) for p, i in reached if last.root in self._carried(i, (last.root,))]
        alike = [(p, i) for p, i in reached if self.t.nodes[i].size == size]
        for found in (carrying, alike, reached):
            if found:
                return found[0]
        raise self._refusal(f"the output of {stretch.name} does not depend on its last residual addition")
