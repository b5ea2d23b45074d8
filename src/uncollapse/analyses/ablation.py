"""Which component keeps the tokens apart? Run a live model without each of them, follow the tokens along depth, and
compare what the textbook, the paper and the model itself say.

The user's own model runs, with components skipped at its residual additions (`interventions.without`); nothing is
re-implemented. Two questions are kept apart because their answers can differ: how many dimensions the tokens span (exact rank),
and how far apart they are (consensus distance). A collapse is followed down to the rounding floor of the model's number format.
Below the floor there is only rounding error.

What this cannot say: what a model *trained without* the component would do. A trained model without one of its parts sees inputs
that it never saw in training. The wording keeps the two apart.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from uncollapse import processes
from uncollapse.analyses.anatomy_recording import anatomy_record
from uncollapse.analyses.preparation import Prepared, ProbeOptions, prepare
from uncollapse.analyses.recording import model_info, probe_record, site_records, versions
from uncollapse.analyses.result import Recorded
from uncollapse.anatomy.influence import moved, poked, without_zeros
from uncollapse.anatomy.probing import float64_kept, probing, seed_all
from uncollapse.anatomy.proof import known_example
from uncollapse.anatomy.stacks import given_mask, hides
from uncollapse.anatomy.streams import met
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.errors import InputError, UncollapseError, UnsupportedModel
from uncollapse.interventions.overlooked_norms import asked_once
from uncollapse.interventions.without import require_blocks, require_components, require_effect
from uncollapse.interventions.without import without as taken_away
from uncollapse.judgement.predictions import verdicts
from uncollapse.judgement.rates import depth_rate
from uncollapse.measures.running import Running
from uncollapse.probe.at_consensus import contraction_at_consensus, few_sequences
from uncollapse.probe.attention import ATTENTION_MEASURES
from uncollapse.probe.clouds import Told
from uncollapse.probe.passes import Level, Observations, Watched
from uncollapse.probe.sharding import united_running
from uncollapse.probe.sublayers import norm_records, update_records
from uncollapse.records.ablation import ABLATION_SCHEMA, AblationRecord, AblationRun, VerdictRecord
from uncollapse.records.common import Statistic
from uncollapse.restoring import leaves_no_trace

GRID = ("norm", "residual", "mlp")


@dataclass(frozen=True, repr=False)
class Ablation(Recorded[AblationRecord]):
    """What `ablate` found. `record` has all of it, as data."""

    @property
    def runs(self) -> list[AblationRun]:
        """The whole model first, then each combination."""
        return self.record.runs

    @property
    def verdicts(self) -> list[VerdictRecord]:
        """Each prediction, compared with what was observed."""
        return self.record.verdicts


@leaves_no_trace
def ablate(
    model: nn.Module | str | Path = "demo",
    texts: Iterable[str] | None = None,
    *,
    without: Sequence[Sequence[str]] | None = None,
    grid: bool = False,
    blocks: Collection[int] | Literal["all", "all+outer"] | None = None,
    level: Level = "core",
    **probe: Unpack[ProbeOptions],
) -> Ablation:
    """Run a model once without each combination of components in `without`, and compare.

    model: a loaded `nn.Module`, a hub id, a local directory, or `"demo"`. texts: one sequence each (default: English prose).
    without: combinations, such as `[("mlp",), ("residual",), ("residual", "mlp")]` (the default). grid: all eight of norm ×
    residual × MLP instead. blocks: remove components in these blocks only. level: `"full"` also measures, for the whole
    model, what each sublayer adds and what each norm does (`updates`, `norms`). With `dtype="float64"` a collapse can be
    followed down to 1e-15 instead of 2e-6.

    Options shared with `diagnose`, each described in `help(uncollapse.analyses.preparation.ProbeOptions)`:
    text: tokenizer, batches, sequences, max_tokens=128, batch_size=16, seed=0;
    model: layout, name, device, dtype, device_map, max_memory, trust_remote_code=False, max_parameters=2000000000000;
    run: command, progress, alone=False.

    Raises `InputError` for an unknown component or block, `TypeError` for an unknown option, and `UnsupportedModel` where the
    additions cannot be found and proved.
    """
    combinations = _combinations(without, grid)
    prepared = prepare(ablate, model, texts, probe, level=level, head=True)
    progress = prepared.progress
    affected = require_blocks(blocks, prepared.anatomy)
    prepared.require_same("options", (combinations, sorted(affected)))
    is_causal = _is_causal(prepared)
    whole: _Outputs | None = None
    told: dict[int, Told] = {}
    runs: list[AblationRun] = []
    first: Observations | None = None
    left_out: dict[str, str] = {}
    with asked_once():
        for number, combination in enumerate(combinations):
            if progress is not None:
                progress("runs", number, len(combinations))
            try:
                if combination:
                    require_effect(prepared.loaded.model, combination, blocks, prepared.batches[0])
                observed, run, outputs = _run(prepared, combination, blocks, is_causal, whole, told)
            except UnsupportedModel as error:
                if without is not None or not combination:
                    raise
                left_out[", ".join(combination)] = str(error)  # a run that nobody named: the others still say something
                continue
            first, whole = first or observed, whole or outputs
            runs.append(run)
    if progress is not None:
        progress("runs", len(combinations), len(combinations))
    assert first is not None
    affected = require_blocks(blocks, prepared.anatomy)
    options = {
        "without": [list(c) for c in combinations[1:]],
        "grid": grid,
        "blocks": blocks if isinstance(blocks, str) else sorted(affected),
    }
    whole_model = first
    return Ablation(
        prepared.judged(lambda: _judged(prepared, whole_model, runs, affected, is_causal, options, left_out)),
        prepared.is_first,
    )


def _judged(
    prepared: Prepared,
    first: Observations,
    runs: list[AblationRun],
    affected: Collection[int],
    is_causal: bool,
    options: Mapping[str, Any],
    left_out: Mapping[str, str],
) -> AblationRecord:
    """The record of all runs. `first` is what was observed of the whole model."""
    described = probe_record(prepared, first)
    described.options.update(options)
    at_consensus = _at_consensus(prepared) if any("residual" in run.without for run in runs) else None
    if left_out:
        described.options["left_out"] = dict(left_out)
    return AblationRecord(
        schema=ABLATION_SCHEMA,
        versions=versions(),
        model=model_info(prepared, first),
        probe=described,
        blocks=sorted(affected),
        is_causal=is_causal,
        runs=runs,
        verdicts=verdicts(
            runs, is_causal=is_causal, at_consensus=at_consensus, epsilon=_epsilon(prepared.loaded.model)
        ),
        norms=norm_records(first.norms),
        updates=update_records(first.updates),
        contraction_at_consensus=at_consensus,
        anatomy=anatomy_record(prepared.anatomy, first),
    )


def _combinations(without: Sequence[Sequence[str]] | None, grid: bool) -> list[tuple[str, ...]]:
    """The combinations to run, the whole model first, each once."""
    if grid and without is not None:
        raise InputError(
            "ablate: expected grid or without, got both. The grid is a list of eight combinations itself. Pass one of them."
        )
    if grid:
        wanted = [c for n in range(len(GRID) + 1) for c in itertools.combinations(GRID, n)]
    elif without is None:
        wanted = [("mlp",), ("residual",), ("residual", "mlp")]
    else:
        if isinstance(without, str) or any(isinstance(c, str) for c in without):
            raise InputError(
                f"ablate: expected without as a list of combinations, got {without!r}. "
                "Each combination is a tuple of components. Pass without=[('mlp',), ('residual', 'mlp')]."
            )
        wanted = [tuple(c) for c in without]
    for combination in wanted:
        if combination:
            require_components(combination)
    return list(dict.fromkeys([(), *wanted]))


def _is_causal(prepared: Prepared) -> bool:
    """Whether every token sees only itself and earlier ones, in the stack that is followed (the decoder, if there is one)."""
    blocks = [prepared.anatomy.blocks[number] for number in prepared.anatomy.stacks[-1].blocks]
    parts = [p for b in blocks for p in b.parts if p.kind == "attention"]
    return bool(parts) and all(p.is_causal for p in parts)


def _at_consensus(prepared: Prepared) -> list[float] | None:
    """What attention keeps apart by positions alone, in the whole model; `None` where its stream cannot be put there."""
    model = prepared.loaded.model
    try:
        with float64_kept(model):
            return contraction_at_consensus(
                model, few_sequences(prepared.batches[0], prepared.anatomy), prepared.anatomy, prepared.seed
            )
    except UncollapseError:  # equal tokens lead the model another way, such as a router with ties
        return None


def _run(
    prepared: Prepared,
    combination: tuple[str, ...],
    blocks: Collection[int] | Literal["all", "all+outer"] | None,
    is_causal: bool,
    whole: _Outputs | None,
    told: dict[int, Told],
) -> tuple[Observations, AblationRun, _Outputs]:
    """One probe pass without `combination`. Of the whole model, which is run first, `whole` are the outputs, and `told` is what it
    told of each batch: which tokens are one sequence may show in nothing but who hears whom."""
    model = prepared.loaded.model
    outputs = _Outputs(prepared, is_causal, whole)

    def begin() -> None:
        outputs.begin()
        if not combination:
            told.clear()

    with contextlib.ExitStack() as stack:
        if combination:
            stack.enter_context(taken_away(model, *combination, blocks=blocks, batch=prepared.batches[0]))
        stack.enter_context(float64_kept(model))
        observed = prepared.captured(
            level=prepared.level,
            watch=_watched(prepared.level, combination),
            digest=lambda _: {},
            begin=begin,
            on_output=outputs.add,
            told=told,
        )
    trajectory = site_records(observed.sites)
    unavailable = {}
    loss_seen, shift_seen, reason = outputs.loss, outputs.shift, outputs.reason
    if prepared.shares:
        loss_seen, shift_seen = united_running([loss_seen, shift_seen], prepared.caller)
        reason = next((each for each in processes.gathered(reason, prepared.caller) if each), "")
    loss = Statistic.of(*loss_seen.summary())
    shift = None if reason else Statistic.of(*shift_seen.summary())
    if loss is None:
        unavailable["loss"] = "the model has no language-model head with a causal mask"
    if shift is None:
        unavailable["output_shift"] = (
            "this is the whole model" if not combination else reason or "the output does not have one vector per token"
        )
    rate = depth_rate(trajectory, _epsilon(model))
    if rate is None:
        unavailable["rate"] = "the consensus distance is not finite"
    run = AblationRun(
        without=list(combination),
        trajectory=trajectory,
        rate=rate,
        loss=loss,
        output_shift=shift,
        attention_contraction=[_most_alive(s.values) for s in observed.attention if s.kind == "self"],
        unavailable=unavailable,
    )
    return observed, run, outputs


def _watched(level: Level, combination: tuple[str, ...]) -> set[Watched]:
    """Of each run the tokens and how much of their spread each head keeps; of the whole model also what its record says about
    its sublayers."""
    watched: set[Watched] = {"sites", "attention"}
    if not combination:
        watched |= {"projections", "sublayers"} if level == "full" else {"projections"}
    return watched


class _Outputs:
    """What is kept of the model's outputs: one mean vector per sequence, and running statistics of loss and shift."""

    def __init__(self, prepared: Prepared, is_causal: bool, whole: _Outputs | None) -> None:
        """The stack that gives the output, the last one, says which tensors of a batch are its token numbers and its padding.
        whole: those of the whole model, with which others are compared."""
        self.prepared, self.is_causal, self.whole = prepared, is_causal, whole
        self.sequence_axis: int | None = None

    def begin(self) -> None:
        """Nothing is kept as yet. Called before each try of the pass: the anatomy may be another one than before."""
        self.sequence_axis = _sequence_axis(self.prepared) if self.whole is None else self.whole.sequence_axis
        self.vectors: list[Tensor] = []
        self.reason = ""  # why there are no vectors of the tokens alone
        self.loss, self.shift = Running.empty(), Running.empty()

    def add(self, batch: Mapping[str, Any], output: Any) -> None:
        """Called by the capture with each batch and the model's output on it."""
        anatomy = self.prepared.anatomy
        stack = anatomy.stacks[-1]
        ids = None if stack.ids is None or stack.ids_transposed else batch.get(stack.ids)
        real = given_mask(stack, batch)
        logits = getattr(output, "logits", None)
        if self.is_causal and logits is not None and ids is not None and logits.shape[:-1] == ids.shape:
            self.loss = self.loss.add(_next_token_loss(logits, ids, real))
        laid = _vectors(output)
        if laid is None:
            return
        if self.sequence_axis is None:
            self.reason = "which axis of the output holds the sequences is not known"
        elif any(m.unit != "token" and hides(m, batch) for m in stack.masks):
            self.reason = "which rows of the output are padding is not known"
        if self.reason:
            return
        laid = laid.transpose(0, 1) if self.sequence_axis == 1 and laid.ndim == 3 else laid
        if real is not None:  # the output may lack what the stream begins or ends with by itself
            masks = [m for m in stack.masks if m.unit == "token"]
            own = real[:, max(m.before for m in masks) : real.shape[1] - max(m.after for m in masks)]
            real = own if laid.shape[1] == own.shape[1] else real
            if laid.shape == real.shape or (laid.ndim == 3 and laid.shape[:2] != real.shape):
                self.reason = "which rows of the output are padding is not known"
                return
        pooled = _pooled(laid, real)
        if self.whole is None:
            self.vectors.append(pooled)
        else:
            reference = self.whole.vectors[len(self.vectors)]
            self.vectors.append(pooled[:0])  # only counts batches
            if reference.shape == pooled.shape:
                self.shift = self.shift.add(1 - torch.cosine_similarity(pooled, reference, dim=-1))


def _sequence_axis(prepared: Prepared) -> int | None:
    """Which of the first two axes of an output [·, ·, width] holds the sequences: the one along which a single place moves when
    the stream of one sequence is changed before the last block. 0 of an output without tokens; None where nothing told it. Asked
    on the example that the anatomy was proved on."""
    model, anatomy = prepared.loaded.model, prepared.anatomy
    block = anatomy.blocks[anatomy.stacks[-1].blocks[-1]]
    example = known_example(model) or prepared.batches[0]
    axes, sequences = block.axes, list[int]()

    def change(stream: Tensor) -> Tensor:
        assert axes is not None
        assert axes.sequence is not None
        sequences.append(stream.shape[axes.sequence])
        return poked(stream, axes.sequence, torch.tensor([0]))

    with probing(model), without_zeros(model):  # a head that starts at zero would show nothing
        seed_all(0)
        plain = _vectors(model(**example))
        if plain is None or plain.ndim != 3:
            return 0
        if axes is None or axes.sequence is None:
            return None
        seed_all(0)
        with met(model, [(block.entry, change)]):
            changed = _vectors(model(**example))
    if not sequences or changed is None or changed.shape != plain.shape:
        return None  # it went another way than was proved, say
    found = [
        axis
        for axis in (0, 1)
        if plain.shape[axis] == sequences[-1] and moved(plain, changed, axis).nonzero().flatten().tolist() == [0]
    ]
    return found[0] if len(found) == 1 else None


def _vectors(output: Any) -> Tensor | None:
    """The first tensor of an output that may hold one vector for each token or sequence."""
    return next((t for t in tensors_in(output) if t.is_floating_point() and t.ndim >= 2), None)


def _pooled(output: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over real tokens of [batch, token, width], in float64 on the CPU. [batch, width] stays unchanged."""
    output = output.detach().double()
    if output.ndim == 3:
        if mask is not None:
            real = mask.bool()[..., None]
            output = torch.where(real, output, 0).sum(1) / real.sum(1)
        else:
            output = output.mean(1)
    return output.flatten(1).cpu()


def _next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Mean next-token cross-entropy of each sequence, in nats."""
    losses = nn.functional.cross_entropy(logits[:, :-1].double().transpose(1, 2), ids[:, 1:], reduction="none")
    if mask is None:
        return losses.mean(1)
    mask = mask[:, -ids.shape[1] :]
    real = mask[:, 1:] & mask[:, :-1]
    return torch.where(real, losses, 0).sum(1) / real.sum(1)


def _most_alive(values: Running) -> Statistic | None:
    row = ATTENTION_MEASURES.index("value_contraction")
    found = [s for h in range(values.total.shape[1]) if (s := Statistic.of(*values.summary(row, h))) is not None]
    return max(found, key=lambda s: s.mean, default=None)


def _epsilon(model: nn.Module) -> float:
    return torch.finfo(next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)).eps


# Rates ----------------------------------------------------------------------------------------------------------------


# Verdicts -------------------------------------------------------------------------------------------------------------
