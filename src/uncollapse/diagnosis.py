"""`diagnose`: which collapse, where, what holds it up. The whole of the product's main job in one call.

A model and some text (or ready batches of any modality) go in; the anatomy is proved, one probe pass observes, rules
judge, and a `Diagnosis` comes out that can show itself, write itself, and be read again a year later.
"""

from __future__ import annotations

import difflib
import inspect
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, TypedDict, Unpack

import torch
from torch import Tensor, nn

from uncollapse import findings, sources
from uncollapse.anatomy.interception import device_of
from uncollapse.anatomy.probing import probing
from uncollapse.anatomy.proof import example, proved_anatomy
from uncollapse.anatomy.tracing import tensors_in
from uncollapse.anatomy.vocabulary import Anatomy, Layout
from uncollapse.attribution import heads_records
from uncollapse.errors import InputError
from uncollapse.phenomena import Components, symmetry_records
from uncollapse.probe.attention import ATTENTION_MEASURES, AttentionStatistics
from uncollapse.probe.context_lengths import require_context_lengths, width_scaling
from uncollapse.probe.passes import Level, Observations, Progress, capture
from uncollapse.probe.sites import MASSIVE_MEASURES, PLAIN_MEASURES, STREAM_MEASURES, SiteStatistics
from uncollapse.probe.sublayers import norm_records, update_records
from uncollapse.recorded import Recorded
from uncollapse.records.common import Finding, ModelInfo, Probe, Statistic
from uncollapse.records.diagnosis import (
    DIAGNOSIS_SCHEMA,
    AttentionRecord,
    DiagnosisRecord,
    MassiveTokensLeftOut,
    SiteRecord,
)

DEFAULT_SEQUENCES = 64


@dataclass(frozen=True)
class Diagnosis(Recorded[DiagnosisRecord]):
    """What `diagnose` found. `record` is the whole of it, as data."""

    @property
    def findings(self) -> list[Finding]:
        """What fired, the most severe first."""
        return self.record.findings

    @property
    def trajectory(self) -> list[SiteRecord]:
        """The token cloud along depth: the embedding, then each block's output."""
        return self.record.trajectory


def diagnose(
    model: nn.Module | str | Path = "demo",
    texts: Sequence[str] | None = None,
    *,
    level: Level = "core",
    context_lengths: Sequence[int] | None = None,
    **probe: Unpack[ProbeOptions],
) -> Diagnosis:
    """Diagnose a model on some text, or on batches of any modality.

    model: a loaded `nn.Module`, a hub id, a local directory, or `"demo"` (the packaged MiniLM).
    texts: one sequence each. Without them (and without `batches`) English prose that Python brings along.
    level: `"core"`, or `"full"` for contraction, spectral gap and susceptibility as well.
    context_lengths: lengths in tokens at which to fit how the second singular value of each attention falls (`symmetries`).

    Options that `ablate`, `identify` and `symmetries` take too, each described in `help(uncollapse.diagnosis.ProbeOptions)`:
    text: tokenizer, batches, sequences, max_tokens=128, batch_size=16, seed=0;
    model: layout, name, device, dtype, device_map, trust_remote_code=False;
    run: command, progress.

    The model is left as it was: its hooks, its mode, every bit of its output.
    Raises `InputError` for input that cannot be used, `TypeError` for an unknown option, and `UnsupportedModel` where the
    anatomy cannot be proved.
    """
    lengths = None if context_lengths is None else require_context_lengths(context_lengths)
    prepared = prepare(diagnose, model, texts, probe, level=level)
    return Diagnosis(observe(prepared, context_lengths=lengths))


class ProbeOptions(TypedDict, total=False):
    """The options of a probe pass, shared by `diagnose`, `ablate`, `identify` and `symmetries`.

    tokenizer: needed for texts beside a loaded model; a model that is loaded here brings its own (default `None`).
    batches: dicts of tensors instead of texts, passed to the model as they are (default `None`).
    sequences: use at most that many of the texts (default `None`: all given ones, or 64 of the built-in prose).
    max_tokens: cut each sequence at that many tokens (default 128).
    batch_size: that many sequences go through the model together (default 16).
    seed: chooses the built-in prose, and whatever else is drawn at random (default 0).
    layout: where the blocks are, if the model's graph does not show them; see `uncollapse.Layout` (default `None`).
    name: what the record calls the model (default `None`: its own name).
    device, dtype, device_map: where a model that is loaded here runs, in which number format, and over which devices it is
    spread (default `None`: CUDA where there is one, the checkpoint's own format, one device).
    trust_remote_code: run the Python code that lies beside a model that is loaded here (default `False`).
    command: the command line, for the record (default `""`).
    progress: called with (what, done, total) as the work goes on (default `None`).
    """

    tokenizer: Any
    batches: Iterable[Mapping[str, Tensor]] | None
    sequences: int | None
    max_tokens: int
    batch_size: int
    seed: int
    layout: Layout | None
    name: str | None
    device: str | None
    dtype: str | None
    device_map: str | None
    trust_remote_code: bool
    command: str
    progress: Progress | None


DEFAULTS: Final[ProbeOptions] = {
    "tokenizer": None,
    "batches": None,
    "sequences": None,
    "max_tokens": 128,
    "batch_size": 16,
    "seed": 0,
    "layout": None,
    "name": None,
    "device": None,
    "dtype": None,
    "device_map": None,
    "trust_remote_code": False,
    "command": "",
    "progress": None,
}
RECORDED_OPTIONS = ("sequences", "max_tokens", "batch_size", "seed", "device", "dtype", "device_map")


@dataclass(frozen=True)
class Prepared:
    """Everything a probe pass needs: the model, its proved anatomy, the batches, and the options as they were resolved.

    `options` are what the record says of them; `command` goes into the record, `progress` is told how the work goes on.
    """

    loaded: sources.LoadedModel
    anatomy: Anatomy
    batches: list[dict[str, Tensor]]
    source: str
    level: Level
    seed: int
    options: dict[str, Any]
    command: str
    progress: Progress | None


def prepare(
    function: Callable[..., object],
    model: nn.Module | str | Path,
    texts: Sequence[str] | None,
    probe: ProbeOptions,
    *,
    level: Level = "core",
    head: bool = False,
) -> Prepared:
    """Load, tokenise and prove, for the public `function` that was called with the options `probe`.

    level: what the pass measures. head: keep a language-model head. Refusals bear the name of `function`. Raises `TypeError`
    for an option that it does not have, `InputError` for input that cannot be used, and `UnsupportedModel` where the anatomy
    cannot be proved.
    """
    caller = function.__name__
    _require_known(function, probe)
    chosen: ProbeOptions = {**DEFAULTS, **probe}
    if level not in ("core", "full"):
        raise InputError(f"{caller}: expected level 'core' or 'full', got {level!r}. Pass one of the two.")
    progress, layout = chosen["progress"], chosen["layout"]
    loaded = _loaded(caller, model, chosen, head)
    if chosen["batches"] is not None:
        if texts is not None:
            raise InputError(
                f"{caller}: expected texts or batches, got both. They are two ways to say the same. Pass one."
            )
        source, ready = "batches", sources.check_batches(chosen["batches"], model=loaded.model)
    else:
        source, ready = _text_batches(caller, loaded, texts, chosen)
    if progress is not None:
        progress("anatomy", 0, 1)
    anatomy = proved_anatomy(loaded.model, ready[0], layout)
    if progress is not None:
        progress("anatomy", 1, 1)
    options = {
        "level": level,
        **{key: value for key, value in chosen.items() if key in RECORDED_OPTIONS},
        "layout": None if layout is None else list(layout.blocks),
    }
    return Prepared(loaded, anatomy, ready, source, level, chosen["seed"], options, chosen["command"], progress)


def _require_known(function: Callable[..., object], probe: ProbeOptions) -> None:
    """Refuse an option that neither `function` nor a probe pass has, as Python refuses an unknown keyword."""
    for given in probe:
        if given not in DEFAULTS:
            own = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
            close = difflib.get_close_matches(given, [*own, *DEFAULTS], 1)
            hint = f"The nearest is {close[0]!r}" if close else "None of its options is spelt like that"
            raise TypeError(
                f"{function.__name__}: expected an option that it has, got {given!r}. {hint}. "
                f"See help(uncollapse.{function.__name__}) for all of them."
            )


def _loaded(caller: str, model: nn.Module | str | Path, chosen: ProbeOptions, head: bool) -> sources.LoadedModel:
    """The model with its tokenizer and its name: as it is where it was given loaded, else loaded here."""
    tokenizer, name, progress = chosen["tokenizer"], chosen["name"], chosen["progress"]
    device, dtype, device_map = chosen["device"], chosen["dtype"], chosen["device_map"]
    if isinstance(model, nn.Module):
        for option, value in {"device": device, "dtype": dtype, "device_map": device_map}.items():
            if value is not None:
                raise InputError(
                    f"{caller}: expected no {option} beside a loaded model, got {value!r}. The model is already somewhere. "
                    "Move it with model.to(...) first."
                )
        label = name or getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        return sources.LoadedModel(model, tokenizer, label, None, "directory")
    if not isinstance(model, (str, Path)):
        raise InputError(
            f"{caller}: expected a model, a name or a path, got {type(model).__name__}. "
            "A configuration or a pipeline is none. Pass the nn.Module itself."
        )
    if progress is not None:
        progress("load", 0, 1)
    loaded = sources.load_model(
        str(model),
        device=device,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=chosen["trust_remote_code"],
        head=head,
    )
    if progress is not None:
        progress("load", 1, 1)
    if tokenizer is None and name is None:
        return loaded
    return sources.LoadedModel(
        loaded.model, tokenizer or loaded.tokenizer, name or loaded.name, loaded.revision, loaded.source
    )


def _text_batches(
    caller: str, loaded: sources.LoadedModel, texts: Sequence[str] | None, chosen: ProbeOptions
) -> tuple[str, list[dict[str, Tensor]]]:
    """Where the texts come from, and the batches that the model is given of them."""
    sequences = chosen["sequences"]
    if sequences is not None and sequences < 1:
        raise InputError(
            f"{caller}: expected at least one sequence, got sequences={sequences}. Pass a positive number."
        )
    source = "texts"
    if texts is None:
        source = "English prose from Python's own documentation (pydoc_data.topics)"
        texts = sources.default_texts(sequences or DEFAULT_SEQUENCES, chosen["seed"])
    elif sequences is not None and not isinstance(texts, str):
        texts = texts[:sequences]
    batches = sources.tokenize(
        texts,
        loaded.tokenizer,
        max_tokens=chosen["max_tokens"],
        batch_size=chosen["batch_size"],
        tokenizer_problem=loaded.tokenizer_problem,
    )
    return source, sources.check_batches(with_true_positions(loaded.model, batches), model=loaded.model)


def with_true_positions(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Batches padded on the left, with `position_ids` said explicitly where the model takes them and counts them from 0.

    Many models count positions from the first column and would shift every shorter sequence. Some (RoBERTa) count from
    the padding by themselves, with an offset of their own; they are told by a try and left alone.
    """
    shifted = [b for b in batches if not bool(b["attention_mask"][:, 0].all())]
    if not shifted or "position_ids" not in inspect.signature(model.forward).parameters:
        return batches
    batch = example(shifted[0])
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    with probing(model):
        device = device_of(model)
        batch = {k: v.to(device) for k, v in batch.items()}
        own = next(tensors_in(model(**batch)))
        told = next(tensors_in(model(**batch, position_ids=positions.to(device))))
    if not torch.equal(own, told):
        return batches
    return [b | {"position_ids": (b["attention_mask"].cumsum(1) - 1).clamp(min=0)} for b in batches]


# Records ------------------------------------------------------------------------------------------------------------


def observe(prepared: Prepared, *, context_lengths: Sequence[int] | None = None) -> DiagnosisRecord:
    """One probe pass, and a pass for each context length, put into one record and judged."""
    model, anatomy, progress = prepared.loaded.model, prepared.anatomy, prepared.progress
    observed = capture(model, prepared.batches, anatomy, level=prepared.level, seed=prepared.seed, progress=progress)
    scaling = []
    if context_lengths is not None:
        scaling = width_scaling(
            model, anatomy, prepared.batches, context_lengths, seed=prepared.seed, progress=progress
        )
    trajectory = site_records(observed)
    attention = [record for s in observed.attention for record in attention_records(s, prepared.level)]
    head_records = heads_records(observed.attention)
    described = probe_record(prepared, observed)
    described.options["context_lengths"] = None if context_lengths is None else list(context_lengths)
    return DiagnosisRecord(
        schema=DIAGNOSIS_SCHEMA,
        versions=versions(),
        model=model_info(prepared, observed),
        probe=described,
        trajectory=trajectory,
        attention=attention,
        heads=head_records,
        norms=norm_records(observed.norms),
        updates=update_records(observed.updates),
        symmetries=symmetry_records(trajectory, attention, head_records, Components.of(model, anatomy), scaling),
        findings=findings.findings(trajectory, attention, head_records),
    )


def probe_record(prepared: Prepared, observed: Observations) -> Probe:
    """What the record says of the text and the options."""
    return Probe(
        sequences=observed.sequences,
        tokens=observed.tokens,
        max_tokens=observed.max_tokens,
        source=prepared.source,
        seed=prepared.seed,
        level=prepared.level,
        device=str(device_of(prepared.loaded.model)),
        command=prepared.command,
        options=prepared.options,
    )


def site_records(observed: Observations) -> list[SiteRecord]:
    """The trajectory, from the embedding on."""
    return [_site_record(s) for s in observed.sites]


def _site_record(site: SiteStatistics) -> SiteRecord:
    plain = {name: Statistic.of(*site.plain.summary(i)) for i, name in enumerate(PLAIN_MEASURES)}
    massive = {name: Statistic.of(*site.massive.summary(i)) for i, name in enumerate(MASSIVE_MEASURES)}
    if site.not_finite and all(v is None for v in plain.values()):
        missing = "NaN or infinity in every sequence"
    else:
        missing = "undefined on this text"
    stream = {name: Statistic.of(*site.stream.summary(i)) for i, name in enumerate(STREAM_MEASURES)}
    unavailable = {name: missing for name, value in (plain | stream).items() if value is None}
    if site.block is None:
        unavailable["stream_carried"] = "no block comes before"
        if "distinct_tokens" in unavailable:
            unavailable["distinct_tokens"] = "the model is given no token ids"
    else:
        unavailable["distinct_tokens"] = "counted at the embedding"
    if "rank_gap" in unavailable and not site.not_finite:
        unavailable["rank_gap"] = "no singular value lies below the cut"
    return SiteRecord(
        site=site.site,
        block=site.block,
        stack=site.stack,
        massive_tokens_left_out=MassiveTokensLeftOut(**massive),
        not_finite=site.not_finite,
        unavailable=unavailable,
        **plain,
        **stream,
    )


def attention_records(statistics: AttentionStatistics, level: Level) -> list[AttentionRecord]:
    """One attention call, head by head."""
    records = []
    for head in range(statistics.call.heads):
        values = {name: Statistic.of(*statistics.values.summary(i, head)) for i, name in enumerate(ATTENTION_MEASURES)}
        unavailable = {
            name: statistics.reasons.get(name) or _missing(name, level)
            for name, value in values.items()
            if value is None
        }
        records.append(
            AttentionRecord(
                block=statistics.block,
                head=head,
                stack=statistics.stack,
                kind=statistics.kind,
                route=statistics.route,
                unavailable=unavailable,
                **values,
            )
        )
    return records


def _missing(measure: str, level: Level) -> str:
    if level == "core" and measure in {"susceptibility", "contraction", "spectral_gap", "second_singular_value"}:
        return "measured with --level full"
    return "not finite or undefined on this text"


def model_info(prepared: Prepared, observed: Observations) -> ModelInfo:
    """What the record says of the model."""
    loaded, anatomy = prepared.loaded, prepared.anatomy
    model = loaded.model
    calls = [s.call for s in observed.attention]
    common = Counter((c.heads, c.key_value_heads, c.head_width) for c in calls).most_common(1)
    heads, key_value_heads, head_width = common[0][0] if common else (0, 0, 0)
    parameters = {id(p): p.numel() for p in model.parameters()}
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    backend = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return ModelInfo(
        name=loaded.name,
        revision=loaded.revision,
        architecture=type(model).__name__,
        blocks=len(anatomy.blocks),
        heads=heads,
        key_value_heads=key_value_heads,
        width=observed.sites[0].width if observed.sites else 0,
        head_width=head_width,
        norm_placement=anatomy.norm_placement,
        parameters=sum(parameters.values()),
        dtype=str(dtype).removeprefix("torch."),
        attention_backend=backend or "the model's own",
    )


def versions() -> dict[str, str]:
    """Of everything a figure depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("uncollapse", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from a source tree, or a model without transformers
            found[package] = "not installed"
    return found
