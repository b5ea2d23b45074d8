"""`symmetries`: the groups act on a live model. Which symmetry is exact, which is broken, and what breaks it?

Let g be a group element and f the model, from its input to the stream after its last block. The equivariance defect is
||f(g x) - g f(x)|| / ||f(x)||, in the Frobenius norm over the real tokens of a sequence. Two references make it readable. One is
the *rounding level*: the same ratio when every block's output is moved by one unit of rounding. The other is the same defect
with a component removed. A component breaks a symmetry if the defect remains when all other candidates are removed.

Gauges are applied to the weights and undone bit for bit; nothing is trained or approximated. The elements are random, well
conditioned and seeded. An exact symmetry holds for all of them, so a single failure decides.

When not to use it: for small defects in half precision, which rounding hides; or to judge a model's health. A broken symmetry
is often the point of an architecture. `findings` judges.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from uncollapse.analyses.diagnosis import observe
from uncollapse.analyses.preparation import Prepared, ProbeOptions, prepare
from uncollapse.analyses.result import Recorded
from uncollapse.anatomy.examples import example, runs_on
from uncollapse.anatomy.interception import device_of
from uncollapse.anatomy.probing import float64_kept, probing
from uncollapse.anatomy.stacks import real_tokens
from uncollapse.anatomy.streams import Action, met
from uncollapse.anatomy.vocabulary import Anatomy, Block, StreamAxes
from uncollapse.errors import InputError, UncollapseError
from uncollapse.interventions.without import removed as taken_away
from uncollapse.judgement.symmetries import at_rounding, completed
from uncollapse.probe.context_lengths import require_context_lengths
from uncollapse.probe.norms_before import with_norms_before
from uncollapse.records.common import Finding, Phenomenon, Statistic
from uncollapse.records.diagnosis import AttentionRecord, DiagnosisRecord
from uncollapse.records.symmetries import SYMMETRIES_SCHEMA, SymmetriesRecord, SymmetryRecord, SymmetryTest
from uncollapse.restoring import leaves_no_trace
from uncollapse.symmetry.acting import acting, drawn, transformed
from uncollapse.symmetry.channels import Channels, channels_of
from uncollapse.symmetry.norm_gauge import NormGauge
from uncollapse.symmetry.pass_groups import KeyPermutation, LogitScaling, LogitShift, TokenPermutation
from uncollapse.symmetry.weight_groups import HeadPermutation, QueryKeyGauge, ValueOutputGauge, WeightElement

SEQUENCES, TOKENS = 4, 32  # what the groups act on: a defect is there in every sequence, or not at all
# Logits times this are all equal to within any number format: attention without its query and key weights.
FLAT = 1e-30
QUERY_KEY = "query and key weights"


@dataclass(frozen=True, repr=False)
class Symmetries(Recorded[SymmetriesRecord]):
    """What `symmetries` found. `record` has all of it, as data."""

    @property
    def symmetries(self) -> list[SymmetryRecord]:
        """The four phenomena: how far the model is from each collapse, and what keeps it there."""
        return self.record.symmetries

    @property
    def tests(self) -> list[SymmetryTest]:
        """Each group acting, with and without the components that break its symmetry."""
        return self.record.tests

    @property
    def findings(self) -> list[Finding]:
        """The findings of a diagnosis on the same text."""
        return self.record.findings


@leaves_no_trace
def symmetries(
    model: nn.Module | str | Path = "demo",
    texts: Iterable[str] | None = None,
    *,
    context_lengths: Sequence[int] | None = None,
    **probe: Unpack[ProbeOptions],
) -> Symmetries:
    """Let the groups of the four phenomena act on a model. Say how far it is from each collapse and what keeps it there.

    model: a loaded `nn.Module`, a hub id, a local directory, or `"demo"`. texts: one sequence each (default: English prose).
    context_lengths: lengths in tokens at which to fit how the second singular value of each attention falls.

    The groups act on the first tokens of a few sequences. The order parameters along depth come from all of the text. Weights
    that a gauge transforms are restored bit for bit, also after an exception.

    Options shared with `diagnose`, each described in `help(uncollapse.analyses.preparation.ProbeOptions)`:
    text: tokenizer, batches, sequences, max_tokens=128, batch_size=16, seed=0;
    model: layout, name, device, dtype, device_map, max_memory, trust_remote_code=False, max_parameters=2000000000000;
    run: command, progress, alone=False.

    Raises `InputError` for input that cannot be used, `TypeError` for an unknown option, and `UnsupportedModel` where the
    anatomy cannot be proved. If something cannot be tested on this model, the record gives the reason.
    """
    lengths = None if context_lengths is None else require_context_lengths(context_lengths)
    prepared = prepare(symmetries, model, texts, probe)
    with float64_kept(prepared.loaded.model):
        diagnosis = observe(prepared, context_lengths=lengths)
        return Symmetries(prepared.judged(lambda: _acted(prepared, diagnosis)), prepared.is_first)


def _acted(prepared: Prepared, diagnosis: DiagnosisRecord) -> SymmetriesRecord:
    """The groups act, and what they show completes the diagnosis."""
    acted = _Acting(prepared)
    tests, stabilisers = acted.tests(), acted.stabilisers(diagnosis.attention)
    return SymmetriesRecord(
        schema=SYMMETRIES_SCHEMA,
        versions=diagnosis.versions,
        model=diagnosis.model,
        probe=diagnosis.probe,
        symmetries=[completed(record, tests, stabilisers) for record in diagnosis.symmetries],
        tests=tests,
        findings=diagnosis.findings,
        anatomy=diagnosis.anatomy,
    )


class _Acting:
    """The groups acting on one model and a few short sequences of its probe."""

    def __init__(self, prepared: Prepared) -> None:
        self.model, self.anatomy = prepared.loaded.model, prepared.anatomy
        self.progress = prepared.progress
        self.generator = torch.Generator().manual_seed(prepared.seed)
        self.seed = prepared.seed
        device = device_of(self.model)
        self.pieces = [
            {k: v.to(device) if isinstance(v, Tensor) else v for k, v in piece.items()}
            for piece in _pieces(self.model, prepared.batches, self.anatomy)
        ]
        self.channels = with_norms_before(
            self.model, self.anatomy, channels_of(self.model, self.anatomy, self.pieces[0]), self.pieces[0]
        )
        self.done = 0

    def tests(self) -> list[SymmetryTest]:
        """Every group, with and without the components that may break its symmetry."""
        found = [*self._token_permutations(), *self._key_permutations()]
        norms = any(NormGauge.surviving(c).survives for c in self.channels)  # else it has nothing to act on, and no row
        found += [self._gauge(group, action) for group, action in _GAUGES if norms or group is not NormGauge]
        found += [self._logit_shift(), self._query_key_scaling(), self._logit_scaling()]
        if self.progress is not None:
            self.progress("symmetries", _TESTS, _TESTS)
        return found

    def stabilisers(self, attention: Sequence[AttentionRecord]) -> dict[Phenomenon, list[str]]:
        """What only shows when the model runs: sinks beside the keys, and a cap that was shown to bound the logits."""
        capped = any(a.bound_part == "soft cap" for a in attention)
        sinks = ["sink columns"] * any(c.sinks for c in self.channels)
        return {"rank-collapse-depth": sinks, "entropy-collapse": ["logit soft cap"] * capped}

    # Token and key permutations -----------------------------------------------------------------------------------
    def _token_permutations(self) -> Iterator[SymmetryTest]:
        """Without positions, where they cannot be removed, the tokens are permuted where they enter the blocks: each brings
        along what it was told of its position. A model that knows order in another way as well is still found out."""
        for away in _combinations("positions", "mask"):
            free = len(away) == 2
            test = self._tested(
                "rank-collapse-depth",
                "token permutation",
                away,
                self._permuting_tokens,
                is_symmetry=free,
                surviving="every order of the tokens" if free else "what positions and mask leave of it",
            )
            if "positions" in away and test.defect is None:
                test = self._tested(
                    "rank-collapse-depth",
                    "token permutation",
                    away,
                    self._permuting_stream,
                    is_symmetry=free,
                    surviving="every order of the tokens, each carrying its position along",
                    carried=True,
                )
            yield test

    def _permuting_tokens(self, piece: dict[str, Any], plain: Tensor) -> tuple[Tensor, Tensor]:
        moved, order = piece, None
        for stack in ("", "decoder_"):
            tokens = piece.get(f"{stack}input_ids")
            if tokens is None and (stack or "decoder_input_ids" in piece):
                continue
            shape = plain.shape[:2] if tokens is None else tokens.shape[:2]
            order = TokenPermutation.random(self.generator, torch.ones(shape, dtype=torch.bool))
            moved = order.batch(moved, stack)
        assert order is not None
        return order.tokens(plain), self._stream(moved)

    def _permuting_stream(self, piece: dict[str, Any], plain: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens in another order where they enter each stack's first block."""
        orders: list[TokenPermutation] = []

        def entering(block: Block) -> Action:
            def permuted(stream: Tensor) -> Tensor:
                if block.axes != StreamAxes(0, (1,), 2):
                    raise InputError(
                        f"symmetries: expected a stream with the axes sequence, token and width, got {tuple(stream.shape)}. "
                        "This model lays out its tokens differently, so they cannot be permuted. Leave this test out."
                    )
                orders.append(TokenPermutation.random(self.generator, torch.ones(stream.shape[:2], dtype=torch.bool)))
                return orders[-1].tokens(stream)

            return permuted

        first = {b.stack: b for b in reversed(self.anatomy.blocks)}.values()
        with met(self.model, [(block.entry, entering(block)) for block in first]):
            got = self._stream(piece)
        return orders[-1].tokens(plain), got

    def _key_permutations(self) -> Iterator[SymmetryTest]:
        for away in _combinations(QUERY_KEY, "mask"):
            free = len(away) == 2
            yield self._tested(
                "rank-collapse-width",
                "key permutation",
                away,
                self._permuting_keys,
                is_symmetry=free,
                surviving="every order of the keys" if free else "none: a limit for long contexts, not a symmetry",
            )

    def _permuting_keys(self, piece: dict[str, Any], plain: Tensor) -> tuple[Tensor, Tensor]:
        with contextlib.ExitStack() as within:
            for stack in dict.fromkeys(b.stack for b in self.anatomy.blocks):
                tokens = piece.get("decoder_input_ids" if stack == "decoder" else "input_ids", piece.get("input_ids"))
                shape = plain.shape[:2] if tokens is None else tokens.shape[:2]
                order = KeyPermutation.random(self.generator, torch.ones(shape, dtype=torch.bool))
                numbers = [i for i, b in enumerate(self.anatomy.blocks) if b.stack == stack]
                within.enter_context(acting(self.model, self.anatomy, order, numbers))
            return plain, self._stream(piece)

    # Gauges -------------------------------------------------------------------------------------------------------
    def _gauge(self, group: type[WeightElement], action: str) -> SymmetryTest:
        subgroups = [(c, group.surviving(c)) for c in self.channels]
        able = [c for c, subgroup in subgroups if subgroup.survives]
        surviving = _summary([(c.block, subgroup.surviving) for c, subgroup in subgroups])
        dimensions = [subgroup.dimension for c, subgroup in subgroups if subgroup.survives]
        test = self._tested(
            "head-channel-non-identifiability",
            action,
            [],
            self._transformed(drawn(group, able, self.generator)) if able else None,
            is_symmetry=group is not QueryKeyGauge or not self._normed(),
            surviving=surviving,
        )
        return replace(test, dimension=_common(dimensions))

    def _transformed(self, elements: Sequence[tuple[Channels, WeightElement]]) -> _Action:
        def act(piece: dict[str, Any], plain: Tensor) -> tuple[Tensor, Tensor]:
            with transformed(self.model, elements):
                return plain, self._stream(piece)

        return act

    # Logits -------------------------------------------------------------------------------------------------------
    def _logit_shift(self) -> SymmetryTest:
        element = LogitShift.random(self.generator)
        return self._tested(
            "entropy-collapse",
            "logit shift",
            [],
            self._inside(element),
            is_symmetry=True,
            surviving="adding a number to all logits of a row",
        )

    def _logit_scaling(self) -> SymmetryTest:
        return self._tested(
            "entropy-collapse",
            "logit scaling",
            [],
            self._inside(LogitScaling(2.0)),
            is_symmetry=False,
            surviving="none: temperature moves attention towards collapse and is not a symmetry",
        )

    def _query_key_scaling(self) -> SymmetryTest:
        """(a W_Q, W_K / a): which of the two weights is large says nothing about the entropy."""
        able = [c for c in self.channels if QueryKeyGauge.surviving(c).survives]
        elements: dict[str, WeightElement] = {}
        acted = []
        for c in able:
            assert c.queries is not None
            element = elements.setdefault(c.queries.place, QueryKeyGauge.entropy_scaling(2.0, c))
            acted.append((c, element))
        return self._tested(
            "entropy-collapse",
            "query-key scaling",
            [],
            self._transformed(acted) if acted else None,
            is_symmetry=not self._normed(),
            surviving="queries multiplied by a number, keys divided by it"
            if acted
            else _summary([(c.block, QueryKeyGauge.surviving(c).surviving) for c in self.channels]),
        )

    def _normed(self) -> bool:
        """Whether queries and keys pass a norm: scales of their weights then show, as far as its epsilon does."""
        return any(c.norm is not None for c in self.channels)

    def _inside(self, element: Any) -> _Action:
        def act(piece: dict[str, Any], plain: Tensor) -> tuple[Tensor, Tensor]:
            with acting(self.model, self.anatomy, element):
                return plain, self._stream(piece)

        return act

    # Measuring ----------------------------------------------------------------------------------------------------
    def _tested(
        self,
        phenomenon: Phenomenon,
        action: str,
        away: Sequence[str],
        act: _Action | None,
        *,
        is_symmetry: bool,
        surviving: str,
        carried: bool = False,
    ) -> SymmetryTest:
        """One group acting without the components `away`; positions that are `carried` along by the tokens stay."""
        if self.progress is not None and not carried:  # a second try at the same test
            self.progress("symmetries", self.done, _TESTS)
            self.done += 1
        test = SymmetryTest(
            phenomenon=phenomenon,
            action=action,
            is_symmetry=is_symmetry,
            surviving=surviving,
            dimension=None,
            without=list(away),
            defect=None,
            rounding=None,
            holds=None,
        )
        if act is None:
            return replace(test, unavailable=dict.fromkeys(["defect", "rounding", "holds"], surviving))
        try:
            defects, levels = self._measured(act, [c for c in away if not (carried and c == "positions")])
        except UncollapseError as error:
            return replace(test, unavailable=dict.fromkeys(["defect", "rounding", "holds"], str(error)))
        test = replace(test, defect=_statistic(defects), rounding=_statistic(levels))
        if test.defect is None or test.rounding is None:
            return replace(test, unavailable=dict.fromkeys(["defect", "holds"], "the stream is not finite"))
        return replace(test, holds=at_rounding(test))

    def _measured(self, act: _Action, away: Sequence[str]) -> tuple[list[float], list[float]]:
        """The defect in every sequence, and the rounding level."""
        names = [name for name in away if name != QUERY_KEY]
        defects, levels = [], []
        with contextlib.ExitStack() as stack:
            rounding = stack.enter_context(_Rounding(self.model, self.anatomy.blocks, self.seed).installed())
            stack.enter_context(probing(self.model, self.seed))
            if names:
                stack.enter_context(taken_away(self.model, *names))
            if QUERY_KEY in away:
                stack.enter_context(acting(self.model, self.anatomy, LogitScaling(FLAT)))
            for piece in self.pieces:
                plain = self._stream(piece)
                expected, got = act(piece, plain)
                defects += _ratios(got - expected, plain)
                with rounding.on():
                    levels += _ratios(self._stream(piece) - plain, plain)
        return defects, levels

    def _stream(self, piece: Mapping[str, Any]) -> Tensor:
        """The stream after the last block [sequence, token, width], in float64."""
        block = self.anatomy.blocks[-1]
        seen: list[Tensor] = []

        def keep(stream: Tensor) -> None:
            seen[:] = [stream]

        with torch.no_grad(), met(self.model, [(block.exit, keep)]):
            self.model(**piece)
        stream = seen[0].detach().double()
        return stream if block.axes is None else block.axes.cloud(stream)


_Action = Callable[
    [dict[str, Any], Tensor], tuple[Tensor, Tensor]
]  # a sequence and its stream → what should come, what comes
_GAUGES: tuple[tuple[type[WeightElement], str], ...] = (
    (ValueOutputGauge, "value-output gauge"),
    (HeadPermutation, "head permutation"),
    (QueryKeyGauge, "query-key gauge"),
    (NormGauge, "layer-norm gauge"),
)
_TESTS = 4 + 4 + len(_GAUGES) + 3


class _Rounding:
    """Moves the stream behind every block by one unit of rounding, each number up or down at random, while it is on."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], seed: int) -> None:
        self.model, self.blocks, self.active = model, blocks, False
        self.generator = torch.Generator().manual_seed(seed)

    @contextlib.contextmanager
    def installed(self) -> Iterator[_Rounding]:
        with met(self.model, [(block.exit, self._moved) for block in self.blocks]):
            yield self

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def _moved(self, stream: Tensor) -> Tensor | None:
        if not self.active:
            return None
        signs = torch.randint(0, 2, stream.shape, generator=self.generator).to(stream) * 2 - 1
        return stream * (1 + torch.finfo(stream.dtype).eps * signs)


def _pieces(model: nn.Module, batches: Sequence[Mapping[str, Any]], anatomy: Anatomy) -> list[dict[str, Any]]:
    """The first tokens of the longest sequences, without padding: one batch where they can be cut to one length. The whole first
    batch where the model does not run on these: its sequences lie end to end."""
    singles = [one for batch in batches for one in _sequences(batch)]
    counts = [_tokens(one, anatomy) for one in singles]
    longest = sorted(range(len(singles)), key=counts.__getitem__, reverse=True)[:SEQUENCES]
    shortest = min([TOKENS, *(counts[i] for i in longest)])
    cut = [example(singles[i], shortest, real_tokens(anatomy, singles[i])) for i in longest]
    with contextlib.suppress(RuntimeError, KeyError):  # their shapes differ, or their inputs: one by one
        cut = [
            {
                k: torch.cat([one[k] for one in cut]) if isinstance(v, Tensor) and v.ndim else v
                for k, v in cut[0].items()
            }
        ]
    return cut if all(runs_on(model, piece) for piece in cut) else [dict(batches[0])]


def _sequences(batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    size = next((v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim), 1)
    for row in range(size):
        yield {
            k: v[row : row + 1] if isinstance(v, Tensor) and v.ndim and v.shape[0] == size else v
            for k, v in batch.items()
        }


def _tokens(one: Mapping[str, Any], anatomy: Anatomy) -> int:
    """How many real tokens a sequence has; for an image, all of them."""
    real = real_tokens(anatomy, one)
    if real is not None:
        return int(real.sum())
    numbers = [one[s.ids].shape[s.ids_transposed ^ 1] for s in anatomy.stacks if s.ids is not None and s.ids in one]
    return numbers[0] if numbers else TOKENS


def _combinations(first: str, second: str) -> list[list[str]]:
    return [[], [first], [second], [first, second]]


def _ratios(difference: Tensor, whole: Tensor) -> list[float]:
    """||difference|| / ||whole|| of every sequence."""
    return [float(v) for v in difference.flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)]


def _statistic(values: Sequence[float]) -> Statistic | None:
    return Statistic.of(sum(values) / len(values), min(values), max(values), len(values))


def _common(values: Sequence[int | None]) -> int | None:
    """The dimension on one attention call, if it is the same on all."""
    return values[0] if len(set(values)) == 1 else None


def _summary(said: Sequence[tuple[int, str]]) -> str:
    """What survives, said once if it is the same in all blocks."""
    blocks: dict[str, list[int]] = {}
    for block, words in said:
        blocks.setdefault(words, []).append(block)
    if len(blocks) == 1:
        return next(iter(blocks))
    return "; ".join(f"blocks {', '.join(map(str, numbers))}: {words}" for words, numbers in blocks.items())
