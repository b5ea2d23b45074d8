"""`diagnose`: which collapse, where, what holds it up. The whole of the product's main job in one call.

A model and some text (or ready batches of any modality) go in; the anatomy is proved, one probe pass observes, rules
judge, and a `Diagnosis` comes out that can show itself, write itself, and be read again a year later.
"""

from __future__ import annotations

import inspect
import itertools
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse import findings, sources
from uncollapse.anatomy import Anatomy, Layout
from uncollapse.attribution import heads_records
from uncollapse.capture import (
    ATTENTION_MEASURES,
    MASSIVE_MEASURES,
    PLAIN_MEASURES,
    STREAM_MEASURES,
    AttentionStatistics,
    Level,
    Observations,
    Progress,
    SiteStatistics,
    capture,
)
from uncollapse.context_lengths import require_context_lengths, width_scaling
from uncollapse.errors import InputError
from uncollapse.interception import probing
from uncollapse.phenomena import Components, symmetry_records
from uncollapse.proof import example, proved_anatomy
from uncollapse.recorded import Recorded
from uncollapse.records import (
    DIAGNOSIS_SCHEMA,
    AttentionRecord,
    DiagnosisRecord,
    Finding,
    MassiveTokensLeftOut,
    ModelInfo,
    Probe,
    SiteRecord,
    Statistic,
)
from uncollapse.sublayers import norm_records, update_records
from uncollapse.tracing import tensors_in

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
    texts: Iterable[str] | None = None,
    *,
    tokenizer: Any = None,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    level: Level = "core",
    context_lengths: Sequence[int] | None = None,
    layout: Layout | None = None,
    sequences: int | None = None,
    max_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Diagnosis:
    """Diagnose a model on some text, or on batches of any modality.

    model: a loaded `nn.Module`, a hub id, a local directory, or `"demo"` (the packaged MiniLM).
    texts: one sequence each; without them (and without `batches`) English prose that Python brings along. `tokenizer` is
    needed beside a loaded model. `batches`: dicts of tensors, passed to the model as they are.
    level: `"core"`, or `"full"` for contraction, spectral gap and susceptibility as well.
    context_lengths: lengths in tokens at which to fit how the second singular value of each attention falls (`symmetries`).
    sequences: at most that many of the texts; all given ones, or 64 of the default prose, without it.
    max_tokens: a sequence is cut there. seed: chooses the default prose. layout: see `uncollapse.Layout`.
    device, dtype, device_map, trust_remote_code: for a model that is loaded here. name: what the record calls the model.
    progress: called with (what, done, total).

    The model is left as it was: its hooks, its mode, every bit of its output.
    Raises `InputError` for input that cannot be used and `UnsupportedModel` where the anatomy cannot be proved.
    """
    lengths = None if context_lengths is None else require_context_lengths(context_lengths)
    prepared = prepare(
        model,
        texts,
        tokenizer=tokenizer,
        batches=batches,
        level=level,
        layout=layout,
        sequences=sequences,
        max_tokens=max_tokens,
        batch_size=batch_size,
        seed=seed,
        device=device,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        name=name,
        progress=progress,
    )
    return Diagnosis(observe(prepared, context_lengths=lengths, command=command, progress=progress))


@dataclass(frozen=True)
class Prepared:
    """Everything a probe pass needs: the model, its proved anatomy, the batches, and the options as they were resolved."""

    loaded: sources.LoadedModel
    anatomy: Anatomy
    batches: list[dict[str, Tensor]]
    source: str
    level: Level
    seed: int
    options: dict[str, Any]


def prepare(
    model: nn.Module | str | Path,
    texts: Iterable[str] | None,
    *,
    tokenizer: Any = None,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    level: Level = "core",
    layout: Layout | None = None,
    sequences: int | None = None,
    max_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    name: str | None = None,
    progress: Progress | None = None,
    head: bool = False,
) -> Prepared:
    """Load, tokenise and prove, with the arguments of `diagnose`; `head` keeps a language-model head."""
    if level not in ("core", "full"):
        raise InputError(f"diagnose: expected level 'core' or 'full', got {level!r}. Pass one of the two.")
    loaded = _loaded(model, tokenizer, name, device, dtype, device_map, trust_remote_code, progress, head)
    if batches is not None:
        if texts is not None:
            raise InputError(
                "diagnose: expected texts or batches, got both. They are two ways to say the same. Pass one."
            )
        source, ready = "batches", sources.check_batches(batches, model=loaded.model)
    else:
        source, ready = _text_batches(loaded, texts, sequences, max_tokens, batch_size, seed)
    if progress is not None:
        progress("anatomy", 0, 1)
    anatomy = proved_anatomy(loaded.model, ready[0], layout)
    if progress is not None:
        progress("anatomy", 1, 1)
    options = {
        "level": level,
        "sequences": sequences,
        "max_tokens": max_tokens,
        "batch_size": batch_size,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "device_map": device_map,
        "layout": None if layout is None else list(layout.blocks),
    }
    return Prepared(loaded, anatomy, ready, source, level, seed, options)


def _loaded(
    model: nn.Module | str | Path,
    tokenizer: Any,
    name: str | None,
    device: str | None,
    dtype: str | None,
    device_map: str | None,
    trust_remote_code: bool,
    progress: Progress | None,
    head: bool,
) -> sources.LoadedModel:
    if isinstance(model, nn.Module):
        for option, value in {"device": device, "dtype": dtype, "device_map": device_map}.items():
            if value is not None:
                raise InputError(
                    f"diagnose: expected no {option} beside a loaded model, got {value!r}. The model is already somewhere. "
                    "Move it with model.to(...) first."
                )
        label = name or getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        return sources.LoadedModel(model, tokenizer, label, None, "directory")
    if not isinstance(model, (str, Path)):
        raise InputError(
            f"diagnose: expected a model, a name or a path, got {type(model).__name__}. "
            "A configuration or a pipeline is none. Pass the nn.Module itself."
        )
    if progress is not None:
        progress("load", 0, 1)
    loaded = sources.load_model(
        str(model), device=device, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code, head=head
    )
    if progress is not None:
        progress("load", 1, 1)
    if tokenizer is None and name is None:
        return loaded
    return sources.LoadedModel(
        loaded.model, tokenizer or loaded.tokenizer, name or loaded.name, loaded.revision, loaded.source
    )


def _text_batches(
    loaded: sources.LoadedModel,
    texts: Iterable[str] | None,
    sequences: int | None,
    max_tokens: int,
    batch_size: int,
    seed: int,
) -> tuple[str, list[dict[str, Tensor]]]:
    if sequences is not None and sequences < 1:
        raise InputError(
            f"diagnose: expected at least one sequence, got sequences={sequences}. Pass a positive number."
        )
    source = "texts"
    if texts is None:
        source = "English prose from Python's own documentation (pydoc_data.topics)"
        texts = sources.default_texts(sequences or DEFAULT_SEQUENCES, seed)
    elif not isinstance(texts, str) and isinstance(texts, Iterable):
        texts = list(itertools.islice(texts, sequences))
    problem = loaded.tokenizer_problem
    batches = sources.tokenize(
        texts, loaded.tokenizer, max_tokens=max_tokens, batch_size=batch_size, tokenizer_problem=problem
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
        device = next(model.parameters()).device
        batch = {k: v.to(device) for k, v in batch.items()}
        own = next(tensors_in(model(**batch)))
        told = next(tensors_in(model(**batch, position_ids=positions.to(device))))
    if not torch.equal(own, told):
        return batches
    return [b | {"position_ids": (b["attention_mask"].cumsum(1) - 1).clamp(min=0)} for b in batches]


# Records ------------------------------------------------------------------------------------------------------------


def observe(
    prepared: Prepared,
    *,
    context_lengths: Sequence[int] | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> DiagnosisRecord:
    """One probe pass, and a pass for each context length, put into one record and judged."""
    model, anatomy = prepared.loaded.model, prepared.anatomy
    observed = capture(model, prepared.batches, anatomy, level=prepared.level, seed=prepared.seed, progress=progress)
    scaling = []
    if context_lengths is not None:
        scaling = width_scaling(
            model, anatomy, prepared.batches, context_lengths, seed=prepared.seed, progress=progress
        )
    trajectory = site_records(observed)
    attention = [record for s in observed.attention for record in attention_records(s, prepared.level)]
    head_records = heads_records(observed.attention)
    described = probe(prepared, observed, command)
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


def probe(prepared: Prepared, observed: Observations, command: str) -> Probe:
    """What the record says of the text and the options."""
    return Probe(
        sequences=observed.sequences,
        tokens=observed.tokens,
        max_tokens=observed.max_tokens,
        source=prepared.source,
        seed=prepared.seed,
        level=prepared.level,
        device=str(next((p.device for p in prepared.loaded.model.parameters()), "cpu")),
        command=command,
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
        missing = site.reason or "undefined on this text"
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
