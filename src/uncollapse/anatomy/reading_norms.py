"""Norms in a recorded graph: modules and pieces of code that behave as one, and whose they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from uncollapse.anatomy.interception import Point, device_of
from uncollapse.anatomy.norm_reading import Piece, cuts, kind_between, next_products, pieces_between
from uncollapse.anatomy.reading_sums import Sum, Sums, walked
from uncollapse.anatomy.replaying import between
from uncollapse.anatomy.torch_calls import PASSES
from uncollapse.anatomy.tracing import Call
from uncollapse.anatomy.vocabulary import (
    Block,
    ModuleCall,
    Norm,
    NormPiece,
    NormRole,
)

_LONGEST_NORM = 64  # operations in a module that may be a norm
_MOST_SOURCES = 4  # values that an embedding is summed of, and so many are followed to its norm
_MOST_PRODUCTS = 24  # products of a part that are followed: of hundreds of experts the first tell as much


class Norms(Sums):
    """The norms on the stream, between its additions, and inside their summands."""

    def norm_kind(self, call: Call) -> Literal["layer", "rms"] | None:
        """Whether the module behaved as a norm in this run, whatever else it was given: told by what it does, on random inputs."""
        if not call.inputs or None not in call.outputs:
            return None
        if call.index not in self._norm_kinds:
            source, result = next(iter(call.inputs.values())), call.outputs[None]
            inside = range(call.first, call.last)
            kind: Literal["layer", "rms"] | None = None
            if self.t.depends(result, source):
                products = any(self.t.is_matrix_product(i) or self.t.is_data_product(i) for i in inside)
                if not products and len(inside) <= _LONGEST_NORM:
                    kind = kind_between(self.t, source, result)
            elif not call.children and source != result:  # it hides what it does from tracing: ask the module itself
                kind = behaves_as_norm(self.model.get_submodule(call.name), self.t.nodes[source].shape)
            self._norm_kinds[call.index] = kind
        return self._norm_kinds[call.index]

    def _outermost_norms(self) -> list[Call]:
        """The runs of modules that are norms and not within another such run."""
        norms = {c.index for c in self.t.calls if self.norm_kind(c) is not None}
        return [self.t.calls[i] for i in sorted(norms) if not norms & set(self.t.call_path(self.t.calls[i].parent))]

    def outer_norms(self, blocks: tuple[Block, ...]) -> tuple[ModuleCall | NormPiece, ...]:
        """The norms that stand in no block: of the embedding, between blocks, the final one."""
        inside = {(b.module.name, b.module.call) for b in blocks if not b.label}
        known = {n.where for b in blocks for n in b.norms}
        found: dict[int, ModuleCall | NormPiece] = {}
        spans: list[range] = []
        for call in self._outermost_norms():
            around = {(self.t.calls[i].name, self.t.calls[i].ordinal) for i in self.t.call_path(call.index)}
            if not around & inside:
                found[call.outputs[None]] = ModuleCall(call.name, call.ordinal)
                spans.append(range(call.first, max(call.last, call.outputs[None] + 1)))
        for piece in self._outer_pieces(blocks):
            covering = [s for s in spans if piece.bare in s]
            if not covering:
                found[piece.target] = self._norm_where(piece)[1] or self._norm_where(piece)[0]
            elif (
                piece.target not in covering[0] and piece.target not in found
            ):  # a module, and a condition's scale behind it
                inner = next(i for i in found if i in covering[0])
                del found[inner]
                found[piece.target] = self._norm_where(piece)[1] or self._norm_where(piece)[0]
        return tuple(found[i] for i in sorted(found) if found[i] not in known)

    def _outer_pieces(self, blocks: tuple[Block, ...]) -> list[Piece]:
        by_run = {(c.name, c.ordinal): c for c in self.t.calls}
        calls = [by_run[b.module.name, b.module.call] for b in blocks]
        entries, exits = zip(*(self.edges[b.entry, b.exit] for b in blocks), strict=True)
        pieces: list[Piece] = []
        for number, start in enumerate(exits):
            if start is None:
                continue
            targets = [
                operand
                for operand, product in next_products(self.t, start, self.t.results).items()
                if not any(
                    c.first <= product < c.last and e in cuts(self.t, start, operand)
                    for c, e in zip(calls, entries, strict=True)
                )
            ]
            following = entries[number + 1] if number + 1 < len(entries) else None
            ends = [*self.t.results, *([following] if following is not None else [])]
            targets += [
                i for i in ends if i != start and self.t.depends(i, start) and not self._product_between(start, i)
            ]
            pieces += pieces_between(self.t, start, targets)
        for entry in dict.fromkeys(e for e in entries if e is not None):
            if any(x is not None and self.t.depends(entry, x) for x in exits):
                continue
            sources = self._makers(entry)[:_MOST_SOURCES]
            pieces += [p for s in sources for p in pieces_between(self.t, s, [entry])]
        return list(dict.fromkeys(pieces))

    def _product_between(self, start: int, end: int) -> bool:
        """Whether a way from `start` to `end` leads through a matrix product."""
        return not cuts(self.t, start, end)

    def _makers(self, index: int) -> list[int]:
        """The values that a value is made of without a matrix product: products, looked-up rows, what was given."""
        nodes = self.t.nodes

        def data(at: int) -> list[int]:
            return [i for i in self._data(nodes[at].inputs) if nodes[i].is_floating]

        def is_maker(at: int) -> bool:
            return at != index and (self.t.is_matrix_product(at) or nodes[at].operation == "embedding" or not data(at))

        start = [index] if nodes[index].is_floating else []
        behind = walked(start, lambda at: () if is_maker(at) or self.t.is_matrix_product(at) else data(at))
        return sorted(filter(is_maker, behind))

    def _norms(self, sums: list[Sum], parts_of: list[list[int]], stream_out: int, block: Call) -> list[Norm]:
        """The norms of a block: pieces of the graph first, then modules that behave as norms and were met in no such piece."""
        found: dict[int, Norm] = {}
        covered: list[Piece] = []
        for piece, role, place in self._norm_pieces(sums, parts_of, stream_out):
            module, written = self._norm_where(piece)
            if piece.target in found:
                if found[piece.target].place != place and role == found[piece.target].role:
                    found[piece.target] = replace(found[piece.target], place=None)
                continue
            found[piece.target] = Norm(module, piece.kind, role, place, written)
            covered.append(piece)
            if role == "post":  # the proof repeats it on the sum, and compares with the stream behind it
                root, following = sums[place or 0].root, [*(s.stream for s in sums[1:]), stream_out][place or 0]
                start = root if self._only_moved(piece.source, root) else piece.source
                end = following if self._only_moved(following, piece.target) else piece.target
                self.t.pieces[found[piece.target].where] = start, end
        for call in self._outermost_norms():
            if not (block.first <= call.first and call.last <= block.last) or call.index == block.index:
                continue
            kind = self.norm_kind(call)
            source, result = next(iter(call.inputs.values())), call.outputs[None]
            if kind is None or any(p.bare == result or call.first <= p.bare < call.last for p in covered):
                continue
            role_part = self._norm_role(source, result, sums, parts_of, stream_out)
            if role_part is not None:
                found[result] = Norm(ModuleCall(call.name, call.ordinal), kind, *role_part)
                self.t.pieces[found[result].where] = source, result
        return [found[i] for i in sorted(found)]

    def _norm_pieces(
        self, sums: list[Sum], parts_of: list[list[int]], stream_out: int
    ) -> Iterable[tuple[Piece, NormRole, int | None]]:
        """The norms of a block on the graph: on the stream behind an addition, before its parts, within them, and behind them."""
        streams = [s.stream for s in sums[1:]] + [stream_out]
        for number, (found, following) in enumerate(zip(sums, streams, strict=True)):
            for piece in pieces_between(self.t, found.root, [following] if following != found.root else []):
                yield piece, "post", number
        for found, numbers in zip(sums, parts_of, strict=True):
            leaves = [self._unwritten(x, found) for x in found.leaves if x != found.stream]
            shared = len(set(numbers)) > 1
            for part in dict.fromkeys(numbers):
                own = [leaf for leaf, number in zip(leaves, numbers, strict=True) if number == part]
                for piece in pieces_between(self.t, found.given, next_products(self.t, found.given, own)):
                    yield piece, "before", None if shared else part
                inside = [i for i in self._products_feeding(own) if self.t.depends(i, found.given)]
                for source in inside[:_MOST_PRODUCTS]:
                    for piece in pieces_between(self.t, source, next_products(self.t, source, own)):
                        if not self._hides_or_shares_out(piece):
                            yield piece, "inner", part
                # However many products come before, behind the last ones stands what is behind the sublayer. Of experts that are
                # added up one by one, the last are nearest to it.
                products = set(inside)
                makers = {leaf: [i for i in self._makers(leaf) if i in products] for leaf in own}
                for source in sorted({i for of in makers.values() for i in of[-_MOST_PRODUCTS:]}, reverse=True):
                    for piece in pieces_between(self.t, source, [leaf for leaf in own if source in makers[leaf]]):
                        yield piece, "after", part

    def last_products(self, sums: list[Sum], parts_of: list[list[int]]) -> dict[int, tuple[Point, ...]]:
        """By part the matrix products of its stream that what it adds is made of without another one; those as wide as that, if
        there are any."""
        made: dict[int, set[int]] = {}
        for found, numbers in zip(sums, parts_of, strict=True):
            leaves = [self._unwritten(x, found) for x in found.leaves if x != found.stream]
            for leaf, part in zip(leaves, numbers, strict=True):
                own = [i for i in self._makers(leaf) if self.t.is_matrix_product(i) and self.t.depends(i, found.given)]
                wide = [i for i in own if self.t.nodes[i].shape[-1:] == self.t.nodes[leaf].shape[-1:]]
                made.setdefault(part, set()).update(wide or own)
        return {part: tuple(dict.fromkeys(map(self._point, sorted(own)))) for part, own in made.items()}

    def _hides_or_shares_out(self, piece: Piece) -> bool:
        """Whether a piece holds the softmax of an attention, which over two keys is as odd as a norm, or hides pairs from it:
        beside -1e9 nothing else seems to grow."""
        steps = {found.score for found in self.attentions.values() if found.score is not None}
        steps |= {step for found in self.attentions.values() for step, _ in found.masking}
        within = [step for step in steps if piece.source < step <= piece.bare]
        return any(
            (piece.bare == step or self.t.depends(piece.bare, step)) and self.t.depends(step, piece.source)
            for step in within
        )

    def _products_feeding(self, leaves: list[int]) -> list[int]:
        return [
            n.index
            for n in self.t.nodes
            if n.is_data
            and (self.t.is_matrix_product(n.index) or n.operation == "scaled_dot_product_attention")
            and any(n.index == leaf or self.t.depends(leaf, n.index) for leaf in leaves)
        ]

    def _norm_where(self, piece: Piece) -> tuple[ModuleCall, NormPiece | None]:
        """The run of the module that is just this norm, or the run whose code holds it with the place in that code."""
        for call in reversed(self.t.calls):
            if (
                not call.inputs
                or None not in call.outputs
                or not call.first <= piece.bare < max(call.last, call.first + 1)
            ):
                continue
            given, result = next(iter(call.inputs.values())), call.outputs[None]
            if self._like(given, piece.source) and self._like(result, piece.target):
                run = ModuleCall(call.name, call.ordinal)
                self.t.pieces.setdefault(run, (given, result))
                return run, None
        call = self.t.calls[self.t.nodes[piece.target].call]
        path = between(self.t, piece.source, piece.target)
        first = next(i for i in path if piece.source in self.t.nodes[i].inputs)
        operation = self.t.tape.operations[piece.target]
        written = NormPiece(
            self._point(first),
            self.t.nodes[first].inputs.index(piece.source),
            self._point(piece.target),
            operation.member,
            "" if operation.is_exchangeable else "its last operation returns an object of a kind of its own",
        )
        self.t.pieces.setdefault(written, (piece.source, piece.target))
        return ModuleCall(call.name, call.ordinal), written

    def _like(self, a: int, b: int) -> bool:
        """Whether two values are one and the same, or one is the other moved or cast."""
        return self._only_moved(a, b) or self._only_moved(b, a)

    def _only_moved(self, index: int, source: int) -> bool:
        while index != source:
            passed = self.t.passes_through(index) if self.t.nodes[index].operation in PASSES else None
            if passed is None:
                return False
            index = passed
        return True

    def _norm_role(
        self, source: int, result: int, sums: list[Sum], parts_of: list[list[int]], stream_out: int
    ) -> tuple[NormRole, int | None] | None:
        streams = [s.stream for s in sums[1:]] + [stream_out]
        for number, (found, following) in enumerate(zip(sums, streams, strict=True)):
            if self.t.depends(result, found.root) and self._normed(following, result):
                return "post", number
        for found, numbers in zip(sums, parts_of, strict=True):
            for leaf, part in zip([x for x in found.leaves if x != found.stream], numbers, strict=True):
                on_path = self.t.depends(leaf, result) or leaf == result
                if not on_path or not (self.t.depends(source, found.given) or source == found.given):
                    continue
                if not self.t.learned(self._unwritten(leaf, found), result):
                    return "after", part
                if not self.t.learned(source, found.given):
                    return "before", part if len(set(numbers)) == 1 else None
                return "inner", part
        return None

    def _normed(self, index: int, source: int) -> bool:
        """Whether value `index` is value `source`, moved, cast, or through further norms."""
        while index != source:
            norm = next(
                (c for c in self.t.calls if c.outputs.get(None) == index and self.norm_kind(c) is not None), None
            )
            passed = self.t.passes_through(index) if norm is None else next(iter(norm.inputs.values()))
            if passed is None:
                return False
            index = passed
        return True

    def _moved(self, index: int, source: int) -> bool:
        """Whether value `index` is value `source`, merely moved or cast."""
        while index != source:
            passed = self._passes(index)
            if passed is None:
                return False
            index = passed
        return True


def behaves_as_norm(module: nn.Module, shape: tuple[int, ...]) -> Literal["layer", "rms"] | None:
    """`layer` or `rms` if the module normalises its last axis, else `None`: f(16x) = f(256x), not constant, and for `layer`
    f(x + c·1) = f(x). `shape` is an input shape the module met in the traced pass."""
    if not shape or isinstance(module, (nn.Softmax, nn.Identity, nn.Dropout)):
        return None
    if any(p.ndim > 1 for p in module.parameters()):  # a norm's parameters are vectors; spares running every linear map
        return None
    parameter = next(module.parameters(), None)
    dtype = parameter.dtype if parameter is not None and parameter.dtype.is_floating_point else torch.float32
    device = device_of(module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, *shape[1:]), generator=generator).to(device, dtype)
    y = torch.randn((2, *shape[1:]), generator=generator).to(device, dtype)
    tolerance = 64 * torch.finfo(dtype).eps
    try:
        with torch.no_grad():
            plain, large, other, shifted = (module(v) for v in (16 * x, 256 * x, 16 * y, 16 * x + 16))
    except Exception:  # a module of whatever kind, given one tensor alone: one that does not take it is no norm here
        return None
    if not all(isinstance(v, Tensor) and v.shape == x.shape for v in (plain, large, other, shifted)):
        return None
    scale = float(plain.abs().max()) or 1.0

    def same(a: Tensor, b: Tensor) -> bool:
        return bool(((a - b).abs().max() <= max(tolerance, 1e-3) * scale).item())

    if not same(plain, large) or same(plain, other):
        return None
    if same(plain, plain.sign()):  # a sign-like activation saturates without normalising
        return None
    return "layer" if same(plain, shifted) else "rms"
