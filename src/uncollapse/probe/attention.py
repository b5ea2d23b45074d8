"""What is measured at an attention call: its matrices, row by row and head by head."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from uncollapse.anatomy.interception import Handler, Point
from uncollapse.anatomy.operands import Lead
from uncollapse.anatomy.pieces import Piece, whole
from uncollapse.anatomy.sequence_loops import Runs, Sequences
from uncollapse.anatomy.streams import Action
from uncollapse.anatomy.vocabulary import Anatomy, AttentionCall, Block, Part, Place
from uncollapse.measures import mixing
from uncollapse.measures.running import Running
from uncollapse.probe.attention_calls import (
    AttentionRows,
    CallObserver,
    Forbidding,
    PieceObserver,
    WholeObserver,
    in_sequence,
)
from uncollapse.probe.clouds import Clouds
from uncollapse.probe.observing import Look, looking
from uncollapse.probe.sizes import norms, single

LEAST_APART = 0.1  # share of the energy that must be centred for a difference to say it
ATTENTION_MEASURES = [
    "entropy",
    "normalized_entropy",
    "entropy_floor",
    "max_logit",
    "rest_entropy",
    "keys_within_reach",
    "key_share",
    "value_contraction",
    "susceptibility",
    "contraction",
    "spectral_gap",
    "second_singular_value",
]

Operands = Callable[
    [int, Sequence[AttentionRows], Tensor | None, Tensor | None], None
]  # sublayer, calls, queries, keys


@dataclass
class AttentionStatistics:
    """Running statistics of one attention call: `values` is [measure, head], `energy` [head] the share of the centred
    output energy. `reasons` says of a measure why it is missing. `matrix` is W_O as [mixed, width], as met in the pass: effective,
    with adapters in it and quantised weights expanded; `reasons["matrix"]` says why it is missing. `figures` are what was
    read off a matrix that does not stay: gathered from several processes, or from disk. `tokens` are the real ones
    that the projection reads; `features` are those of `Part`; `sinks` says that the softmax also ran over columns that belong to
    no key. `deviation`, `row_sums` and `finite` are what the pass bore out, and `forbids` what forbade pairs in each of the
    sublayer's calls, see `AttentionRows`."""

    block: int
    kind: Literal["self", "cross"]
    stack: Literal["encoder", "decoder"] | None
    call: AttentionCall
    values: Running
    energy: Running
    route: str = ""
    reasons: dict[str, str] = field(default_factory=dict)
    matrix: Tensor | None = None
    figures: dict[str, Any] | None = None
    tokens: Running = field(default_factory=Running.empty)
    sinks: bool = False
    features: tuple[int, ...] = ()
    deviation: float = 0.0
    row_sums: tuple[float, float] = (math.inf, -math.inf)
    finite: bool = False
    forbids: dict[int, list[Forbidding]] = field(default_factory=dict)

    @property
    def seen(self) -> bool:
        """Whether the attention ran in some pass, and anything finite came of it."""
        return self.finite or bool(self.values.count.any())


def attention_places(anatomy: Anatomy) -> list[tuple[int, int]]:
    """Block and part of each attention, in the order in which the probe lists them."""
    return [
        (number, index)
        for number, block in enumerate(anatomy.blocks)
        for index, part in enumerate(block.parts)
        if part.kind in {"attention", "cross"}
    ]


def attention_statistics(number: int, block: Block, part: Part) -> AttentionStatistics:
    """Of the attention `part` of a block, with nothing seen yet."""
    first = part.attention[0]
    shared = sum(c.key_value_heads for c in part.beside)
    call = replace(first, heads=part.heads, key_value_heads=shared)
    return AttentionStatistics(
        number,
        "cross" if part.kind == "cross" else "self",
        block.stack,
        call,
        Running.empty(len(ATTENTION_MEASURES), call.heads),
        Running.empty(call.heads),
        sinks=any(c.before or c.after or c.drops_columns for c in part.attention),
        features=part.features,
    )


class Attention:
    """Measures the attention calls of each attention sublayer; an `Observer`. Always: whether the pass bears the reading out,
    what forbade pairs, and how much of the values' spread each head keeps. With `rows` also every row, with `spectra` the
    decomposed matrices. `sublayers`: each attention part with its statistics. `hand_on` is given the number of the sublayer and
    its mixed values [sequence, head, token, width], None where they cannot be had; `operands` is given that number, what its calls
    read and mixed, and which of their queries and keys are real."""

    def __init__(
        self,
        anatomy: Anatomy,
        sublayers: Sequence[tuple[Part, AttentionStatistics]],
        clouds: Clouds,
        is_own: Callable[[], bool],
        *,
        rows: bool = True,
        susceptibility: bool = False,
        spectra: bool = False,
        hand_on: Callable[[int, Tensor | None], None] | None = None,
        operands: Operands | None = None,
    ) -> None:
        self.anatomy, self.clouds = anatomy, clouds
        self.rows, self.susceptibility, self.spectra = rows, susceptibility, spectra
        self._hand_on, self._operands = hand_on, operands
        self.streams: list[tuple[Place, Action]] = []
        self._in_turn: list[_Loop] = []
        # Calls may share their way: one softmax, and a product for each head.
        looks: dict[Point, list[Look]] = {}
        for index, (part, statistics) in enumerate(sublayers):
            problem = next((c.unreadable for c in part.attention if c.unreadable is not None), None)
            if problem is not None:
                statistics.reasons |= dict.fromkeys(ATTENTION_MEASURES, problem)
            elif part.in_pieces:
                self._watch_pieces(index, part, statistics, looks)
            elif part.by_sequence:
                self._watch_in_turn(index, part, statistics, looks, is_own)
            else:
                self._watch(index, part, statistics, looks)
        self.handlers: dict[Point, Handler] = {p: looking(several, is_own) for p, several in looks.items()}

    def _watch(self, index: int, part: Part, statistics: AttentionStatistics, looks: dict[Point, list[Look]]) -> None:
        shares_queries = part.attention[0].shares_queries
        entered, number = self.clouds.entered, statistics.block
        met: dict[int, AttentionRows] = {}
        chooses = self.anatomy.blocks[number].chooses_tokens

        def deliver(call: int, found: AttentionRows) -> None:
            met[call] = found
            if len(met) == len(part.attention):
                several = [met[i] for i in range(len(met))]
                met.clear()
                answered = sum(each.shape[2] for each in several)
                if shares_queries and answered != entered.get(number, (0, answered))[1]:
                    refuse("its queries are shared out among another number of calls than on the example")
                    return
                tokens = entered.get(number, (0, 0))[1]
                whole = [rows for rows, c in zip(several, part.attention, strict=True) if c.queries_of_tokens]
                if tokens and not chooses and any(rows.shape[2] != tokens for rows in whole):
                    refuse("it answers for some of its queries only, where it answered for all of them on the example")
                    return
                self._measure(index, statistics, [in_sequence(several)] if shares_queries else several)

        def refuse(reason: str) -> None:
            if self._hand_on is not None:
                self._hand_on(index, None)
            met.clear()
            statistics.reasons |= dict.fromkeys(ATTENTION_MEASURES, reason)

        def own_queries(queries: int, sequences: int) -> Tensor | None:
            """The mask of a call's queries; of one that answers for some of them, of those behind the ones that were met."""
            total = entered.get(number, (0, queries))[1]
            mask = self._query_mask(statistics, total, sequences)
            start = sum(each.shape[2] for each in met.values())
            return None if mask is None else mask[:, start : start + queries]

        for position, each in enumerate(part.attention):
            observer = CallObserver(
                each,
                sequences=lambda: self.clouds.batch_size,
                tokens=lambda: entered.get(number, (0, None))[1],
                query_mask=own_queries if shares_queries else functools.partial(self._query_mask, statistics),
                key_mask=functools.partial(self._key_mask, statistics),
                rows=self.rows,
                susceptibility=self.susceptibility,
                # A matrix that several calls make is put together before it is looked at.
                spectra=self.spectra and not shares_queries,
                keeps_weights=self.spectra and shares_queries,
                deliver=functools.partial(deliver, position),
                refuse=refuse,
            )
            for point, look in observer.observers().items():
                looks.setdefault(point, []).append(look)

    def _watch_in_turn(
        self,
        index: int,
        part: Part,
        statistics: AttentionStatistics,
        looks: dict[Point, list[Look]],
        is_own: Callable[[], bool],
    ) -> None:
        """Watch calls that mix one sequence at a time. What they bring is measured when the last sequence has come, each sequence
        by itself."""
        number, clouds = statistics.block, self.clouds
        place = next(i for i, other in enumerate(self.anatomy.blocks[number].parts) if other is part)
        loop = _Loop(len(part.attention), lambda: clouds.runs.get((number, place), "its sequences were not told apart"))
        self._in_turn.append(loop)

        def deliver(call: int, found: AttentionRows) -> None:
            sequence = loop.come(call)
            if found.shape[2] != loop.tokens(sequence, clouds.entered.get(number)):
                refuse("it answers for some of its queries only, where it answered for all of them on the example")
                return
            loop.met[sequence, call] = found
            if len(loop.met) < loop.count * len(part.attention):
                return
            several = [[loop.met[s, c] for c in range(len(part.attention))] for s in range(loop.count)]
            loop.met.clear()
            for number_of, calls in enumerate(several):
                self._measure(index, statistics, calls, number_of)
            if self._hand_on is not None:
                self._hand_on(index, _padded([_mixed(calls) for calls in several]))

        def refuse(reason: str) -> None:
            loop.is_refused = True
            loop.met.clear()
            if self._hand_on is not None:
                self._hand_on(index, None)
            statistics.reasons |= dict.fromkeys(ATTENTION_MEASURES, reason)

        def end(_: Tensor) -> None:
            if is_own() and loop.is_incomplete():
                refuse("not all of its sequences were met")

        def tokens(call: int) -> int | None:
            return loop.tokens(loop.now(call), clouds.entered.get(number))

        def query_mask(call: int, queries: int, _: int) -> Tensor | None:
            return self._query_mask(statistics, queries, 1, loop.now(call))

        def key_mask(call: int, keys: int, _: int) -> Tensor | None:
            return self._key_mask(statistics, keys, 1, loop.now(call))

        for position, each in enumerate(part.attention):
            observer = CallObserver(
                each,
                sequences=lambda: 1,
                tokens=functools.partial(tokens, position),
                query_mask=functools.partial(query_mask, position),
                key_mask=functools.partial(key_mask, position),
                rows=self.rows,
                susceptibility=self.susceptibility,
                spectra=self.spectra,
                keeps_weights=False,
                deliver=functools.partial(deliver, position),
                refuse=refuse,
            )
            for point, look in observer.observers().items():
                looks.setdefault(point, []).append(loop.guarded(look, position, point == each.product, refuse))
        self.streams.append((self.anatomy.blocks[number].exit, end))

    def _watch_pieces(
        self, index: int, part: Part, statistics: AttentionStatistics, looks: dict[Point, list[Look]]
    ) -> None:
        """Watch calls whose rows are put together. The attention is measured when the last of them has come, sequence by
        sequence."""
        number, clouds = statistics.block, self.clouds
        place = next(i for i, other in enumerate(self.anatomy.blocks[number].parts) if other is part)
        met: dict[int, Piece] = {}
        forbade: list[Forbidding] = []
        found: list[AttentionRows] = []

        def come(call: int, piece: Piece, steps: list[Forbidding]) -> None:
            met[call] = piece
            forbade.extend(step for step in steps if step not in forbade)
            if len(met) < len(part.attention):
                return
            several = [met[i] for i in range(len(met))]
            met.clear()
            pieces = clouds.pieces.get((number, place), "where its weights stand was not told")
            if isinstance(pieces, str):
                refuse(pieces)
                return
            if any(
                p.queries.shape != s.product.mixed.flatten(0, -3).shape[:2]
                for p, s in zip(pieces.placed, several, strict=True)
            ):
                refuse("its products have other sizes than when it was told where its weights stand")
                return
            found.clear()
            for sequence in range(pieces.sequences):
                one(sequence).measure(whole(pieces, sequence, several), forbade)
            forbade.clear()
            if len(found) < pieces.sequences:
                return
            for sequence, rows in enumerate(found):
                self._measure(index, statistics, [rows], sequence)
            if self._hand_on is not None:
                self._hand_on(index, _padded([_mixed([rows]) for rows in found]))

        def refuse(reason: str) -> None:
            met.clear()
            if self._hand_on is not None:
                self._hand_on(index, None)
            statistics.reasons |= dict.fromkeys(ATTENTION_MEASURES, reason)

        def one(sequence: int) -> WholeObserver:
            return WholeObserver(
                replace(part.attention[0], lead=(Lead("sequence"), Lead("head"))),
                sequences=lambda: 1,
                tokens=lambda: None,
                query_mask=lambda queries, _: self._query_mask(statistics, queries, 1, sequence),
                key_mask=lambda keys, _: self._key_mask(statistics, keys, 1, sequence),
                rows=self.rows,
                susceptibility=self.susceptibility,
                spectra=self.spectra,
                keeps_weights=False,
                deliver=found.append,
                refuse=refuse,
            )

        for position, each in enumerate(part.attention):
            observer = PieceObserver(each, functools.partial(come, position), refuse)
            for point, look in observer.observers().items():
                looks.setdefault(point, []).append(look)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """It needs no hooks: it stands at operations only."""
        yield

    def begin(self, batch: Mapping[str, Any]) -> None:
        """Nothing is kept from one batch to the next."""
        for loop in self._in_turn:
            loop.begin()

    def let_go(self) -> None:
        self.handlers.clear()
        self.streams.clear()
        self._in_turn.clear()

    def _query_mask(
        self, statistics: AttentionStatistics, queries: int, sequences: int, own: int | None = None
    ) -> Tensor | None:
        """Which queries are real, of all sequences or of its `own` one."""
        stack, what = self.anatomy.stack_of(statistics.block), f"the attention of block {statistics.block}"
        mask = self.clouds.mask(stack, queries, what)
        if mask is not None and own is not None:
            mask = mask[own : own + 1]
        return mask if mask is None or mask.shape[0] == sequences else None

    def _key_mask(
        self, statistics: AttentionStatistics, keys: int, sequences: int, own: int | None = None
    ) -> Tensor | None:
        """Which keys are real, of all sequences or of its `own` one."""
        stack = self.anatomy.stack_of(statistics.block)
        known = self.clouds.paddings[stack].mask
        if known is not None and own is not None:
            known = known[own : own + 1]
        if statistics.kind == "self" and known is not None and known.shape[-1] < keys:
            # A cache that the model fills itself (virtual tokens of prefix tuning) comes before the text; its keys are real.
            known = torch.cat([known.new_ones(len(known), keys - known.shape[-1]), known], -1)
            return known if known.shape[0] == sequences else None
        if statistics.kind == "cross":
            encoder = next((i for i, s in enumerate(self.anatomy.stacks) if s.name == "encoder"), None)
            if encoder is None or self.clouds.shapes.get(encoder, (0, keys))[1] != keys:
                return None
            stack = encoder
        mask = self.clouds.mask(stack, keys, f"the keys of block {statistics.block}")
        if mask is not None and own is not None:
            mask = mask[own : own + 1]
        return mask if mask is None or mask.shape[0] == sequences else None

    def _measure(
        self, index: int, statistics: AttentionStatistics, found: Sequence[AttentionRows], sequence: int | None = None
    ) -> None:
        """Add one pass through a sublayer's attention calls, their heads one after the other: of the whole batch, or of one
        `sequence` of it."""
        columns: dict[str, list[Tensor]] = {name: [] for name in ATTENTION_MEASURES}
        for call, each in enumerate(found):
            forbids = statistics.forbids.setdefault(call, [])
            forbids += [one for one in each.forbids if one not in forbids]
            sequences, count, queries = each.shape
            own = dict.fromkeys(ATTENTION_MEASURES, torch.full((sequences, count), math.nan, dtype=torch.float64))
            if each.rows is not None:
                statistics.route = each.rows.route
                own |= _means_over_rows(each.rows)
            query_mask = self._query_mask(statistics, queries, sequences, sequence)
            if each.values is not None and each.mixed is not None:
                key_mask = self._key_mask(statistics, each.values.shape[-2], sequences, sequence)
                before, after = spread(each.values, key_mask), spread(each.mixed, query_mask)
                own["value_contraction"] = after / before.repeat_interleave(count // before.shape[1], 1)
                spectrum = each.spectrum
                if each.weights is not None:
                    spectrum = mixing.leading_spectrum_from_weights(
                        each.weights, query_mask=query_mask, key_mask=key_mask
                    )
                if spectrum is not None:
                    own |= _spectra(spectrum)
                    if bool((spectrum.error > mixing.COARSE).any()):
                        statistics.reasons |= dict.fromkeys(_SPECTRA, _CLOSE_TOGETHER)
            statistics.reasons |= each.reasons
            statistics.deviation = max(statistics.deviation, each.deviation)
            statistics.row_sums = (
                min(statistics.row_sums[0], each.row_sums[0]),
                max(statistics.row_sums[1], each.row_sums[1]),
            )
            statistics.finite |= each.finite
            for name in ATTENTION_MEASURES:
                columns[name].append(own[name].to("cpu", torch.float64))
        if self._operands is not None:
            queries, keys = found[0].shape[2], None if found[0].values is None else found[0].values.shape[2]
            sequences = found[0].shape[0]
            key_mask = None if keys is None else self._key_mask(statistics, keys, sequences, sequence)
            self._operands(index, found, self._query_mask(statistics, queries, sequences, sequence), key_mask)
        if self._hand_on is not None and sequence is None:
            self._hand_on(index, _mixed(found))
        statistics.values = statistics.values.add(
            torch.stack([torch.cat(columns[n], 1) for n in ATTENTION_MEASURES], 1)
        )


class _Loop:
    """Where an attention is in its loop over the sequences of a batch. `known`: these, and which turn of each of its `calls` mixes
    which, or why that is not known."""

    def __init__(self, calls: int, known: Callable[[], tuple[Sequences, Runs] | str]) -> None:
        self.calls, self._known = calls, known
        self.met: dict[tuple[int, int], AttentionRows] = {}  # by sequence and call
        self.begin()

    def begin(self) -> None:
        """Another batch comes."""
        self.is_refused = False
        self.met.clear()
        self._turns = [0] * self.calls

    @property
    def count(self) -> int:
        """How many sequences there are."""
        known = self._known()
        return 0 if isinstance(known, str) else len(known[0].places)

    def now(self, call: int) -> int:
        """The sequence that this turn of a call mixes."""
        known = self._known()
        assert not isinstance(known, str)
        return known[1][call][self._turns[call]]

    def come(self, call: int) -> int:
        """The same, when the turn is over."""
        sequence = self.now(call)
        self._turns[call] += 1
        return sequence

    def tokens(self, sequence: int, entered: tuple[int, int] | None) -> int | None:
        """How many tokens a sequence has, padding included. `entered`: sequences and tokens of the stream."""
        known = self._known()
        if not isinstance(known, str) and known[0].is_packed:
            return len(known[0].places[sequence])
        return None if entered is None else entered[1]

    def is_incomplete(self) -> bool:
        """Whether some turns were met, and not all."""
        return not self.is_refused and 0 < sum(self._turns) < self.count * self.calls

    def guarded(self, look: Look, call: int, at_product: bool, refuse: Callable[[str], None]) -> Look:
        """A look at a call's operations, taken only in turns of which the sequence is known."""

        def guarded(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            known = self._known()
            if self.is_refused:
                return
            if isinstance(known, str):
                refuse(known)
            elif self._turns[call] < self.count:
                look(function, args, kwargs, output)
            elif at_product:
                refuse("its loop over sequences has more turns than there are sequences")

        return guarded


def _mixed(calls: Sequence[AttentionRows]) -> Tensor | None:
    """What all heads of several calls mixed; None where that cannot be had."""
    mixed = [each.mixed for each in calls if each.mixed is not None]
    same = len(mixed) == len(calls) and len({m.shape[2:] for m in mixed}) == 1
    return torch.cat(mixed, 1) if same else None


def _padded(several: Sequence[Tensor | None]) -> Tensor | None:
    """The mixed values of sequences [1, head, token, width] in one tensor; None where one of them is missing."""
    known = [each[0].transpose(0, 1) for each in several if each is not None]
    if len(known) < len(several):
        return None
    return torch.nn.utils.rnn.pad_sequence(known, batch_first=True).transpose(1, 2)


def _means_over_rows(rows: mixing.RowStatistics) -> dict[str, Tensor]:
    """Of each head in each sequence, [sequence, head]: the mean over its rows, and the largest logit."""
    means = [
        "entropy",
        "normalized_entropy",
        "entropy_floor",
        "rest_entropy",
        "keys_within_reach",
        "key_share",
        "susceptibility",
    ]
    known = {name: figure for name in means if (figure := getattr(rows, name)) is not None}
    together = torch.stack(list(known.values())).double().nanmean(-1)
    found = dict(zip(known, together, strict=True))
    if rows.max_logit is not None:
        found["max_logit"] = rows.max_logit.double().nan_to_num(nan=-math.inf).amax(-1)
    return found


def spread(x: Tensor, mask: Tensor | None) -> Tensor:
    """||C X||_F over real tokens for x [batch, head, token, width], as [batch, head] in float64: from the tokens' sizes and their
    sum, and from centred tokens where that difference loses digits."""
    x, sizes = single(x), norms(x)
    real = x.new_ones(x.shape[0], x.shape[2], dtype=torch.bool) if mask is None else mask
    if mask is not None:
        # A product does where padding is finite, at a fifth of the cost.
        is_finite = bool(sizes.isfinite().all())
        x = x * mask[:, None, :, None] if is_finite else torch.where(mask[:, None, :, None], x, 0)
        sizes = sizes.where(mask[:, None], 0)
    count, total, common = real.sum(-1, keepdim=True), sizes.square().sum(-1), x.sum(-2)
    energy = total - common.double().square().sum(-1) / count
    lost = ~(energy > LEAST_APART * total)
    if bool(lost.any()):
        sequence = lost.nonzero()[:, 0]
        apart = norms(x[lost] - (common[lost] / count[sequence]).unsqueeze(-2))
        energy[lost] = apart.where(real[sequence], 0).square().sum(-1)
    return energy.sqrt()


_SPECTRA = ["contraction", "spectral_gap", "second_singular_value"]
_CLOSE_TOGETHER = "its largest singular values lie so close together that products do not tell them to a hundredth"


def _spectra(spectrum: mixing.LeadingSpectrum) -> dict[str, Tensor]:
    """Contraction, gap and second singular value, [batch, head] each."""
    first, second = spectrum.singular_values.unbind(-1)
    return dict(zip(_SPECTRA, (spectrum.contraction, 1 - second / first, second), strict=True))
