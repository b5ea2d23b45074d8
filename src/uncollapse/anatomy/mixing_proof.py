"""What the axes of an attention's product hold, found by poking: which slices are whose sequence, what is a head, what a key.

A sequence of the stream is changed: the slices of the product's result that move are its slices. One token is changed: the rows
of the values that move are its keys. Sizes decide nothing, so that a batch as large as the number of heads, or a sequence as long
as a head is wide, cannot be mistaken for it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from uncollapse.anatomy.block_alone import POKE_SEED, BlockAlone, observing, results_of
from uncollapse.anatomy.carrying import Way
from uncollapse.anatomy.influence import moved_rows
from uncollapse.anatomy.interception import Handler
from uncollapse.anatomy.operands import (
    Lead,
    Mixed,
    SeveralChoicesError,
    UnreadableError,
    any_pair,
    arranged,
    chosen_pair,
    product_operands,
    replaced,
)
from uncollapse.anatomy.pieces import Piece, pieces_of, projection_of, whole
from uncollapse.anatomy.row_sums import sums_to_one
from uncollapse.anatomy.sequence_loops import OF_ITS_OWN, as_one, in_groups, sequences_of_runs
from uncollapse.anatomy.summands import with_operands
from uncollapse.anatomy.torch_calls import operands_of, operation_name
from uncollapse.anatomy.vocabulary import AttentionCall, MaskingStep, Part, StreamAxes

MIXES_FEATURES = "it mixes features, not tokens: one token moves every row of what it mixes"


@dataclass(frozen=True)
class Poked:
    """One product as it ran on the example, with each sequence of the stream changed in turn, with the first token of the first
    sequence changed, and (cross-attention) with everything but the stream changed."""

    plain: Mixed
    sequences: Sequence[Mixed]
    token: Mixed
    memory: Mixed | None


def located(
    call: AttentionCall, poked: Poked, tokens: int, *, alone: bool, chooses_tokens: bool = False
) -> AttentionCall:
    """`call` with what its axes hold. `tokens`: of one sequence of the stream. `alone`: the sublayer's only product.
    `chooses_tokens`: it may answer for some of the tokens.

    Raises `UnreadableError` with the reason where pokes do not single out sequences, heads and keys.
    """
    mixed, values = poked.plain.mixed, poked.plain.values
    count = len(poked.sequences)
    moved = torch.stack([moved_rows(mixed, p.mixed).any(-1) for p in poked.sequences])  # [sequence, *lead]
    if not bool(moved.reshape(len(moved), -1).any(-1).all()) and not bool(mixed.isfinite().all()):
        raise UnreadableError("what it mixes on the example is not finite, and does not show which sequence is which")
    lead = _sequences(moved, count)
    is_cross = poked.memory is not None
    token = _inner(
        moved_rows(mixed, poked.token.mixed) if is_cross else moved_rows(values, poked.token.values), lead, count
    )
    one = poked.sequences[0]
    alive = _inner(moved_rows(mixed, one.mixed) if is_cross else moved_rows(values, one.values), lead, count).any(-1)
    lead = _heads_and_windows(token.any(-1), lead, alive)
    rows = token.reshape(-1, token.shape[-1]).any(0)  # of one sequence: the keys (cross: queries) that one token moves
    whole = poked.memory if is_cross else one
    assert whole is not None
    keys = _inner(moved_rows(values, whole.values), lead, count)
    keys = keys.reshape(-1, keys.shape[-1]).any(0)
    if not bool(keys.any()):
        raise UnreadableError("nothing that it mixes depends on the tokens")
    before, after = int(keys.int().argmax()), int(keys.flip(0).int().argmax())
    of_tokens = len(keys) - before - after
    if (before or after) and call.has_other_data and not is_cross:
        raise UnreadableError("it attends to tokens of its own stream and to those of another at once")
    if int(keys.sum()) != of_tokens:
        raise UnreadableError("keys that are no tokens stand between those that are")
    if bool(rows.all() if is_cross else rows[keys].all()) and len(rows) > 1 and tokens > 1:
        raise UnreadableError(MIXES_FEATURES)
    heads = math.prod(_sizes(mixed, lead, count, "head"))
    windows = math.prod(_sizes(mixed, lead, count, "window"))
    if alone and not is_cross and not chooses_tokens and mixed.shape[-2] * windows < tokens:
        # Pieces of the sequence whose keys overlap: a token is seen by all of two, as by heads.
        raise UnreadableError(f"each of its slices answers for {mixed.shape[-2] * windows} of {tokens} tokens")
    return replace(
        call,
        lead=lead,
        heads=heads,
        key_value_heads=_distinct(arranged(values, _of(values, lead, mixed), count)),
        head_width=values.shape[-1],
        before=before,
        after=after,
        keys_of_tokens=not is_cross and of_tokens * windows == tokens,
        queries_of_tokens=mixed.shape[-2] * windows == tokens,
        shares_queries=not is_cross and not alone and mixed.shape[-2] * windows < tokens,
    )


def _of(tensor: Tensor, lead: tuple[Lead, ...], mixed: Tensor) -> tuple[Lead, ...]:
    """The leading axes of an operand that has as many as the result."""
    if tensor.ndim != mixed.ndim:
        raise UnreadableError(f"its values have {tensor.ndim} axes, its result {mixed.ndim}")
    return lead


def _sequences(moved: Tensor, count: int) -> tuple[Lead, ...]:
    """Which leading axis holds the sequences, from the slices [sequence, *lead] that move with each. Slices that nothing moves,
    those of dead heads, have no say."""
    axes = moved.ndim - 1
    if count == 1:
        return (Lead("head"),) * axes
    owners = moved.sum(0)
    if bool((owners > 1).any()):
        raise UnreadableError("it mixes several sequences of the batch")
    owner, known = moved.int().argmax(0), owners == 1
    if not bool(known.any()):
        raise UnreadableError("none of it depends on the tokens")
    if len(owner[known].unique()) < count:
        raise UnreadableError(OF_ITS_OWN)
    found: list[Lead] = []
    for axis in range(axes):
        along = owner.movedim(axis, 0).flatten(1) if axes > 1 else owner[:, None]
        said = known.movedim(axis, 0).flatten(1) if axes > 1 else known[:, None]
        index = torch.arange(len(along), device=along.device)[:, None]

        def agrees(expected: Tensor, along: Tensor = along, said: Tensor = said) -> bool:
            return bool(((along == expected) | ~said).all())

        first = along.gather(1, said.int().argmax(1, keepdim=True))
        if not agrees(first):
            found.append(Lead("head"))
        elif len(index) == count and agrees(index):
            found.append(Lead("sequence"))
        elif len(index) % count == 0 and agrees(index // (len(index) // count)):
            found.append(Lead("sequence-major"))
        elif agrees(index % count):
            found.append(Lead("sequence-minor"))
        else:
            raise UnreadableError("its sequences lie in an order that was not understood")
    if sum(axis.role != "head" for axis in found) != 1:
        raise UnreadableError("its sequences lie along several axes")
    return tuple(found)


def _inner(moved: Tensor, lead: tuple[Lead, ...], count: int) -> Tensor:
    """What moved [*lead, row] in the first sequence, as [*inner, row]: one axis for each that is not the sequence."""
    parts, shape = moved, list[int]()
    position = None
    for size, axis in zip(moved.shape[:-1], lead, strict=True):
        if axis.role == "sequence":
            position = len(shape)
            shape.append(size)
        elif axis.role == "sequence-major":
            position = len(shape)
            shape += [count, size // count]
        elif axis.role == "sequence-minor":
            position = len(shape) + 1
            shape += [size // count, count]
        else:
            shape.append(size)
    parts = parts.reshape(*shape, moved.shape[-1])
    return parts if position is None else parts.select(position, 0)


def _heads_and_windows(token: Tensor, lead: tuple[Lead, ...], alive: Tensor) -> tuple[Lead, ...]:
    """Heads are slices that all see a token; of windows one does. `token` [*inner]: what one token moved; `alive` [*inner]: what
    moves at all. A dead head sees nothing."""
    kinds: list[Literal["head", "window"]] = []
    for axis in range(token.ndim):
        seen = token.movedim(axis, 0).flatten(1).any(-1) if token.ndim > 1 else token
        able = alive.movedim(axis, 0).flatten(1).any(-1) if alive.ndim > 1 else alive
        if bool(seen[able].all()) and bool(able.any()):
            kinds.append("head")
        elif int(seen.sum()) == 1:
            kinds.append("window")
        else:
            raise UnreadableError("a token is seen by some slices and not by others")
    found, remaining = list[Lead](), iter(kinds)
    for each in lead:
        if each.role == "sequence":
            found.append(each)
        elif each.role == "head":
            found.append(Lead(next(remaining)))
        else:
            found.append(Lead(each.role, next(remaining)))
    return tuple(found)


def _sizes(mixed: Tensor, lead: Sequence[Lead], count: int, kind: str) -> list[int]:
    sizes = []
    for size, axis in zip(mixed.shape[:-2], lead, strict=True):
        if axis.role == kind:
            sizes.append(size)
        elif axis.role.startswith("sequence-") and axis.inner == kind:
            sizes.append(size // count)
    return sizes


def _distinct(values: Tensor) -> int:
    """How many different value matrices the heads of the first sequence have. values [sequence, head, window, key, width]

    Values that do not vary are equal for another reason: the heads that are alive say how many share one matrix."""
    heads = values[0]
    kept: list[Tensor] = []
    shared: list[int] = []
    for head in heads:
        same = next((i for i, other in enumerate(kept) if torch.equal(head, other)), None)
        if same is None:
            kept.append(head)
            shared.append(1)
        else:
            shared[same] += 1
    alive = {n for n, head in zip(shared, kept, strict=True) if not bool((head == head[..., :1, :]).all())}
    size = next(iter(alive)) if len(alive) == 1 else 0
    return len(heads) // size if size and len(heads) % size == 0 else len(kept)


def placed(numbers: Tensor, shape: Sequence[int], call: AttentionCall, count: int) -> tuple[str | None, ...]:
    """What each axis of a masking step's result holds. `numbers` [*lead, query, key]: which entry of that result, counted through
    its `shape`, has become this weight."""
    found = arranged(numbers, call.lead, count).round().long()
    sequence, head, window, query, key = torch.meshgrid(*(torch.arange(n) for n in found.shape), indexing="ij")
    roles: list[str | None] = []
    remaining = found
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :])
        index, remaining = remaining // stride, remaining % stride
        candidates = {
            "sequence": sequence,
            "key": key - call.before,
            "query": query,
            "head": head,
            "sequence-major": sequence * found.shape[1] + head,
            "sequence-minor": head * count + sequence,
        }
        tokens = slice(call.before, found.shape[-1] - call.after)
        fitting = [role for role, at in candidates.items() if torch.equal(index[..., tokens], at[..., tokens])]
        roles.append(fitting[0] if shape[axis] > 1 and fitting and not bool(window.any()) else None)
    return tuple(roles)


class HeadsMixing(BlockAlone):
    """One block, run by itself to see what its attentions mix."""

    def mixes(
        self, number: int, part: Part, stream: Tensor, axes: StreamAxes | None, reason: str
    ) -> tuple[AttentionCall, ...]:
        """What the axes of this part's products hold, found by poking each sequence, one token, and the memory of a
        cross-attention. With the other parts removed, a token reaches the product by itself alone."""
        if axes is None:
            return tuple(replace(call, unreadable=reason) for call in part.attention)
        if axes.sequence is None:
            return self._mixes_one_by_one(number, part, stream, axes)
        others = tuple(i for i in range(len(self.block.parts)) if i != number)
        generator = torch.Generator().manual_seed(POKE_SEED)
        noise = torch.randn(stream.shape, generator=generator).to(stream) * (stream.double().std().to(stream) + 1)
        sequences, tokens = axes.cloud(stream).shape[:2]
        pairs = {
            i: self._pair(call, others, stream, noise, axes) for i, call in enumerate(part.attention) if call.is_einsum
        }
        part = replace(part, attention=tuple(replace(c, pair=pairs.get(i)) for i, c in enumerate(part.attention)))

        def observed(stream: Tensor, memory: bool = False) -> list[Mixed | str]:
            found: list[Mixed | str] = ["it did not run"] * len(part.attention)
            handlers = {c.product: _noting_product(found, i, c) for i, c in enumerate(part.attention)}

            def is_all() -> bool:
                return "it did not run" not in found

            self._replay(others, stream, handlers, poke_memory=memory, is_all=is_all)
            return found

        plain = observed(stream)
        in_turn_poked = []
        for sequence in range(sequences):
            changed = stream.clone()
            changed.select(axes.sequence, sequence).add_(noise.select(axes.sequence, sequence))
            in_turn_poked.append(observed(changed))
        token = plain
        most = stream.shape[axes.token[-1]] if self.block.chooses_tokens else 1  # the first may be none of the chosen
        for at in range(most):
            one = stream.clone()
            places = {axes.sequence: 0} | dict.fromkeys(axes.token, 0) | {axes.token[-1]: at}
            index = tuple(places.get(axis, slice(None)) for axis in range(stream.ndim))
            one[index] += noise[index]
            token = observed(one)
            if any(_differ(before, after) for before, after in zip(plain, token, strict=True)):
                break
        memory = observed(stream, memory=True) if part.kind == "cross" else None
        found = []
        for i, call in enumerate(part.attention):
            met = [plain[i], token[i], *([memory[i]] if memory is not None else []), *(p[i] for p in in_turn_poked)]
            views = [view for view in met if not isinstance(view, str)]
            if len(views) < len(met):
                found.append(replace(call, unreadable=next(view for view in met if isinstance(view, str))))
                continue
            first = 2 if memory is None else 3
            pokes = Poked(views[0], views[first:], views[1], None if memory is None else views[2])
            try:
                alone = len(part.attention) == 1
                known = located(call, pokes, tokens, alone=alone, chooses_tokens=self.block.chooses_tokens)
                known = replace(known, masking=self._masking_axes(known, others, sequences))
                if views[0].mixed.dtype.itemsize <= 2:  # rounding would hide that they do not
                    run = functools.partial(self._replay, others)
                    known = replace(known, sums_to_one=sums_to_one(self.module, run, stream, known, sequences))
                found.append(known)
            except UnreadableError as error:
                found.append(replace(call, unreadable=str(error)))
        choosing = [c for c in found if c.serves_weights and c.unreadable == MIXES_FEATURES]
        if choosing:  # they only help to choose whom the others attend to, and attend to nothing
            others_of = tuple(c for c, f in zip(part.attention, found, strict=True) if f not in choosing)
            return self.mixes(number, replace(part, attention=others_of), stream, axes, reason)
        if any(call.shares_queries for call in found):
            alike = len(set(map(_layout, found))) == 1
            if not alike or not all(c.shares_queries for c in found) or not self._in_turn(found, others, axes):
                reason = (
                    "several attention calls of one sublayer share out its queries in a way that was not understood"
                )
                found = [replace(call, unreadable=call.unreadable or reason) for call in found]
        if part.kind == "attention" and all(call.unreadable == OF_ITS_OWN for call in found):
            return self._mixes_one_by_one(number, part, stream, axes)
        if part.kind == "attention" and len(found) > 1 and any(call.unreadable for call in found):
            return self._mixes_in_pieces(number, replace(part, attention=tuple(found)), others, axes)
        return tuple(found)

    def _mixes_in_pieces(
        self, number: int, part: Part, others: tuple[int, ...], axes: StreamAxes
    ) -> tuple[AttentionCall, ...]:
        """The part's calls where they are pieces of one attention, whose places are told by numbers; else as they are."""
        shapes: dict[int, tuple[int, int] | None] = {}
        seen: dict[int, Mixed] = {}

        def choosing(index: int, call: AttentionCall) -> Handler:
            def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                output = function(*args, **kwargs)
                with contextlib.suppress(UnreadableError):
                    shapes[index] = any_pair(args, output, call.weight_operand or 0)
                return output

            return handler

        def noting(index: int, call: AttentionCall) -> Handler:
            def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                output = function(*args, **kwargs)
                with contextlib.suppress(UnreadableError):
                    seen[index] = product_operands(function, args, kwargs, output, call.weight_operand or 0, call.pair)
                return output

            return handler

        calls = part.attention
        if any(call.is_fused or call.serves_weights for call in calls) or self.block.chooses_tokens:
            return calls
        self._replay(others, None, {c.product: choosing(i, c) for i, c in enumerate(calls) if c.is_einsum})
        calls = tuple(replace(c, pair=shapes.get(i), unreadable=None) for i, c in enumerate(calls))
        try:
            known = pieces_of(self, number, replace(part, attention=calls), axes)
            self._replay(others, None, {c.product: noting(i, c) for i, c in enumerate(calls)})
            if len(seen) < len(calls):
                raise UnreadableError("it did not run")
            first = whole(known, 0, [Piece(seen[i]) for i in range(len(calls))])
        except UnreadableError:
            return part.attention
        shared = _distinct(first.product.values[:, :, None])
        return tuple(
            replace(
                call,
                is_piece=True,
                projection=projection_of(calls),
                lead=(),
                heads=known.heads,
                key_value_heads=shared,
                head_width=known.head_width,
                before=0,
                after=0,
                shares_queries=False,
                keys_of_tokens=False,
                queries_of_tokens=False,
            )
            for call in calls
        )

    def _mixes_one_by_one(self, number: int, part: Part, stream: Tensor, axes: StreamAxes) -> tuple[AttentionCall, ...]:
        """The part's calls where each mixes a single sequence: those that a loop over sequences runs again and again as one. One
        sequence by itself is a loop with one turn."""
        try:
            sequences = self.sequences(axes)
            if part.kind != "attention" or len(axes.token) != 1:
                raise UnreadableError(OF_ITS_OWN)
            runs = sequences_of_runs(lambda given: results_of(self.runs_mixed(number, part, given)), stream, sequences)
            if any(len(each) != 1 for each in runs):
                raise UnreadableError("it did not run")
            owners = [owner for (owner,) in runs]
            everyone = range(len(sequences.places))
            plain, whole, token = (
                self.runs_mixed(number, part, given)
                for given in (
                    stream,
                    sequences.poked(stream, everyone),
                    sequences.first_tokens_poked(stream, axes.token[0]),
                )
            )
            groups, calls, turns = in_groups(part.attention, owners), [], []
            for group in groups:
                known = [
                    located(
                        part.attention[i],
                        Poked(plain[i][0], [whole[i][0]], token[i][0], None),
                        sequences.tokens(owners[i], stream, axes.token[0]),
                        alone=len(groups) == 1,
                    )
                    for i in group
                ]
                if len(set(map(_layout, known))) != 1 or not all(
                    c.queries_of_tokens and c.keys_of_tokens for c in known
                ):
                    raise UnreadableError(f"{OF_ITS_OWN}, and these do not answer for all of its tokens alike")
                others = tuple(i for i in range(len(self.block.parts)) if i != number)
                lead = _alone_first(known[0].lead, [plain[i][0].mixed.shape for i in group])
                first = replace(known[0], lead=lead, masking=self._masking_axes(known[0], others, 1))
                calls.append(as_one([first, *known[1:]]))
                turns.append(tuple(owners[i] for i in group))
        except UnreadableError as error:
            return tuple(replace(call, unreadable=str(error)) for call in part.attention)
        self.runs[number] = tuple(turns)
        return tuple(calls)

    def _pair(
        self, call: AttentionCall, others: tuple[int, ...], stream: Tensor, noise: Tensor, axes: StreamAxes
    ) -> tuple[int, int] | None:
        """Which axes of the weights hold queries and keys, where the product itself leaves that open: one token moves a single
        place of the keys, and its query alone a single place of the queries. None where the product says it, or nothing told it."""
        if call.similarity is None or call.weight_operand is None:
            return None
        product: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

        def met(stream: Tensor, queries: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
            """The queries, and the operands of the product, with other queries in the place of its own."""
            seen: list[Tensor] = []

            def comparing(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                operands = operands_of(operation_name(function), args, kwargs)
                seen.append(operands[call.query_operand].detach().clone())
                if queries is not None:
                    args, kwargs = with_operands(args, kwargs, {call.query_operand: lambda _: queries})
                return function(*args, **kwargs)

            def mixing(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                operands = operands_of(operation_name(function), args, kwargs)
                seen.extend(t.detach().clone() for t in operands)
                output = function(*args, **kwargs)
                product.append((args, kwargs, output))
                return output

            assert call.similarity is not None
            self._replay(others, stream, {call.similarity: comparing, call.product: mixing})
            return seen[0], seen[1:]

        _, plain = met(stream)
        try:
            product_operands(torch.einsum, *product[0], call.weight_operand)
        except SeveralChoicesError:
            pass
        except UnreadableError:
            return None
        else:
            return None
        for token in (-1, 0):  # of causal attention the first token sees itself alone, whatever its query
            one = stream.clone()
            places = {axes.sequence: 0} | dict.fromkeys(axes.token, token)
            index = tuple(places.get(axis, slice(None)) for axis in range(stream.ndim))
            one[index] += noise[index]
            other_queries, changed = met(one)
            _, asked = met(stream, other_queries)
            of_weights = _single_places(plain[call.weight_operand], asked[call.weight_operand])
            of_values = _single_places(plain[call.value_operand], changed[call.value_operand])
            found = chosen_pair(*product[0], call.weight_operand, (of_weights, of_values))
            if found is not None:
                return found
        return None

    def _in_turn(self, calls: list[AttentionCall], others: tuple[int, ...], axes: StreamAxes) -> bool:
        """Whether calls that answer for some of the queries each answer for all of them together, one after the other: each is
        blanked in turn, and the tokens whose rows then change are its own."""
        plain = axes.cloud(self._replay(others))
        taken: list[int] = []
        for call in calls:
            without = axes.cloud(self._replay(others, None, {call.product: _zeroed}))
            taken += (without != plain).any(-1).any(0).nonzero().flatten().tolist()
        return taken == list(range(plain.shape[1]))

    def _masking_axes(self, call: AttentionCall, others: tuple[int, ...], sequences: int) -> tuple[MaskingStep, ...]:
        """The masking steps with what the axes of their results hold, told by where their entries arrive among the weights."""
        steps = []
        for step in call.masking:
            arrived, shape = self._arriving(call, step, others)
            if arrived is not None:
                step = replace(step, axes=placed(arrived, shape, call, sequences))
            steps.append(step)
        return tuple(steps)

    def _arriving(
        self, call: AttentionCall, step: MaskingStep, others: tuple[int, ...]
    ) -> tuple[Tensor | None, tuple[int, ...]]:
        """Which entry of a masking step's result every weight was, [*lead, query, key], and the shape of that result."""
        way, shapes, arrived = Way(call, step), list[tuple[int, ...]](), list[Tensor]()
        handlers = {point: observing(observe) for point, observe in way.observers().items()}

        within = handlers[step.point]

        def noting_shape(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = within(function, args, kwargs)
            shapes.append(tuple((output if isinstance(output, Tensor) else args[0]).shape))
            return output

        def at_product(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = function(*args, **kwargs)
            operand = operands_of(operation_name(function), args, kwargs)[call.weight_operand or 0]
            _, numbers = way.end(operand)
            if numbers is not None:
                swapped = replaced([args, kwargs], operand, numbers.expand(operand.shape))
                seen = product_operands(function, swapped[0], swapped[1], output, call.weight_operand or 0, call.pair)
                if seen.weights is not None:
                    arrived.append(seen.weights)
            return output

        self._replay(others, None, {**handlers, step.point: noting_shape, call.product: at_product})
        return (arrived[0], shapes[0]) if arrived else (None, ())


def _alone_first(lead: tuple[Lead, ...], shapes: Sequence[Sequence[int]]) -> tuple[Lead, ...]:
    """The leading axes of a product that mixes one sequence: the first axis that is of length one in all turns is that of it."""
    alone = next((i for i in range(len(lead)) if all(shape[i] == 1 for shape in shapes)), None)
    return tuple(Lead("sequence") if i == alone and axis.role == "head" else axis for i, axis in enumerate(lead))


def _layout(call: AttentionCall) -> tuple[object, ...]:
    """What calls have in common that are one attention."""
    return call.heads, call.head_width, call.lead, call.before, call.after


def _zeroed(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Zeros in place of what an operation gives."""
    return torch.zeros_like(function(*args, **kwargs))


def _noting_product(found: list[Mixed | str], number: int, call: AttentionCall) -> Handler:
    """Keep the operands and the result of a product that mixes values, or why they cannot be read."""

    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = function(*args, **kwargs)
        try:
            seen = product_operands(function, args, kwargs, output, call.weight_operand or 0, call.pair)
            found[number] = Mixed(None, seen.values.detach().clone(), seen.mixed.detach().clone())
        except UnreadableError as error:
            found[number] = str(error)
        return output

    return handler


def _differ(before: Mixed | str, after: Mixed | str) -> bool:
    """Whether a product mixes other values than before, as far as both could be read."""
    if isinstance(before, str) or isinstance(after, str):
        return False
    return not torch.equal(before.values, after.values)


def _single_places(before: Tensor, after: Tensor) -> set[int]:
    """The axes along which a single place of several differs."""
    different = before != after
    return {
        axis
        for axis in range(before.ndim)
        if before.shape[axis] > 1 and int(different.movedim(axis, 0).flatten(1).any(-1).sum()) == 1
    }
