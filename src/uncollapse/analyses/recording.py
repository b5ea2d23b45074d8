"""From statistics to records."""

from __future__ import annotations

import functools
import platform
from collections import Counter
from collections.abc import Sequence
from importlib import metadata

import torch

from uncollapse import __version__, sources
from uncollapse.analyses.preparation import Prepared
from uncollapse.anatomy.interception import device_of
from uncollapse.measures import mixing
from uncollapse.measures.corpus import Comparison, CorpusMeasures, compared, corpus_measures
from uncollapse.measures.running import Running, RunningCloud
from uncollapse.probe.attention import ATTENTION_MEASURES, AttentionStatistics
from uncollapse.probe.corpus import CorpusStatistics
from uncollapse.probe.logit_bounds import LogitBound
from uncollapse.probe.passes import Level, Observations
from uncollapse.probe.sites import (
    MASSIVE_MEASURES,
    PLAIN_MEASURES,
    SIDE_BY_SIDE_MEASURES,
    STREAM_MEASURES,
    SiteStatistics,
)
from uncollapse.records.common import ModelInfo, Probe, Statistic
from uncollapse.records.diagnosis import (
    AttentionRecord,
    CorpusRecord,
    MassiveTokensLeftOut,
    ReaderRecord,
    SiteRecord,
    StreamRecord,
)
from uncollapse.wrappers import class_of, seen_through


def probe_record(prepared: Prepared, observed: Observations) -> Probe:
    """What the record says about the text and the options."""
    counts = {"sequences": observed.sequences, "tokens": observed.tokens, "max_tokens": observed.max_tokens}
    counted: dict[str, int | None] = {**counts} if not observed.uncounted else dict.fromkeys(counts)
    return Probe(
        **counted,
        unavailable=dict.fromkeys(counts, observed.uncounted) if observed.uncounted else {},
        source=prepared.source,
        seed=prepared.seed,
        level=prepared.level,
        device=str(device_of(prepared.loaded.model)),
        command=prepared.command,
        options=prepared.options,
        fingerprint=sources.fingerprint(prepared.batches),
        processes=prepared.processes,
    )


def site_records(sites: Sequence[SiteStatistics]) -> list[SiteRecord]:
    """The trajectory, from the embedding on."""
    return [_site_record(s) for s in sites]


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
        streams=[_stream_record(number, running) for number, running in enumerate(site.side_by_side)],
        readers=[ReaderRecord(name, Statistic.of(*running.summary(0))) for name, running in site.readers.items()],
        unavailable=unavailable,
        **plain,
        **stream,
    )


def _stream_record(number: int, running: Running) -> StreamRecord:
    measures = {name: Statistic.of(*running.summary(i)) for i, name in enumerate(SIDE_BY_SIDE_MEASURES)}
    return StreamRecord(number, **measures)


def attention_records(
    statistics: AttentionStatistics, level: Level, bound: LogitBound | None = None
) -> list[AttentionRecord]:
    """One attention call, head by head. `bound`: of its logits, where somebody looked."""
    records = []
    known = None if bound is None else bound.range
    for head in range(statistics.call.heads):
        values = {name: Statistic.of(*statistics.values.summary(i, head)) for i, name in enumerate(ATTENTION_MEASURES)}
        # A figure that one batch did not bear out is none of the whole text.
        values = {name: None if name in statistics.reasons else value for name, value in values.items()}
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
                logit_range_bound=known,
                disperses_beyond=None if known is None else mixing.dispersion_length(known),
                bounded_by="" if bound is None else bound.because,
                bound_part=None if bound is None else bound.part,
                **values,
            )
        )
    return records


def _missing(measure: str, level: Level) -> str:
    if level == "core" and measure in {"susceptibility", "contraction", "spectral_gap", "second_singular_value"}:
        return "measured with --level full"
    return "not finite or undefined on this text"


def corpus_records(statistics: Sequence[CorpusStatistics], *, between: bool = True) -> list[CorpusRecord]:
    """The cloud of the corpus at every site and in every pooling, and with `between` what lies between it and the one before."""
    known = [s for s in statistics if s.cloud is not None and s.cloud.count]
    clouds = [cloud for s in known if (cloud := s.cloud) is not None]
    place = {id(s): i for i, s in enumerate(known)}
    pairs = [(place[id(s.before)], i) for i, s in enumerate(known) if between and id(s.before) in place]
    apart = compared([clouds[before] for before, _ in pairs], [clouds[after] for _, after in pairs])
    figures = dict(enumerate(corpus_measures(clouds, [s.epsilon for s in known])))
    beside = {}
    for (before, after), found in zip(pairs, apart, strict=True):
        has_spread = all(figures[place].participation_ratio is not None for place in (before, after))
        # Points that are one up to rounding have directions of rounding: only how far each has turned is known.
        beside[after] = found if has_spread else Comparison(None, None, None, found.cosine)
    return [_corpus_record(s, figures.get(place.get(id(s), -1)), beside.get(place.get(id(s), -1))) for s in statistics]


def _corpus_record(
    statistics: CorpusStatistics, measured: CorpusMeasures | None, beside: Comparison | None
) -> CorpusRecord:
    site, cloud = statistics.site, statistics.cloud
    width = site.width if cloud is None else len(cloud.mean)
    found = measured or corpus_measures([RunningCloud.of(torch.zeros(0, max(width, 1)), torch.zeros(0))], [0.0])[0]
    compared_with = beside or Comparison(None, None, None, None)
    values = {**vars(found), **vars(compared_with)}
    if cloud is not None and statistics.seen > cloud.count:  # the cloud is a sample of what was seen
        values |= {"points": statistics.seen, "sampled": cloud.count}
    nothing = statistics.reason or ("NaN or infinity in every sequence" if site.not_finite else "no point was seen")
    unavailable = {
        name: _why_not(name, found, statistics, nothing)
        for name, value in values.items()
        if value is None and name != "sampled"
    }
    is_beside = any(value is not None for value in vars(compared_with).values())
    return CorpusRecord(
        site=site.site,
        block=site.block,
        stack=site.stack,
        pooling=statistics.pooling,
        width=width,
        compared=len(cloud.points) if is_beside and cloud is not None else None,
        unavailable=unavailable,
        **values,
    )


def _why_not(name: str, found: CorpusMeasures, statistics: CorpusStatistics, nothing: str) -> str:
    if not found.points:
        return nothing
    if name in Comparison.__annotations__:
        if statistics.before is None:
            return "no block comes before"
        return "the points before and after are not the same ones, or have no spread"
    if found.points == 1:
        return "a single point has no spread"
    if name.startswith("alpha") and found.centred_effective_rank:
        return "too few directions for a power law"
    return "all points are equal, up to rounding"


def model_info(prepared: Prepared, observed: Observations) -> ModelInfo:
    """What the record says about the model."""
    loaded, anatomy = prepared.loaded, prepared.anatomy
    model = loaded.model
    calls = [s.call for s in observed.attention]
    calls = [call for call in calls if not call.unreadable] or calls
    common = Counter((c.heads, c.key_value_heads, c.head_width) for c in calls).most_common(1)
    heads, key_value_heads, head_width = common[0][0] if common else (0, 0, 0)
    parameters = {id(p): p.numel() for p in model.parameters()}
    dtype = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    backend = getattr(getattr(seen_through(model), "config", None), "_attn_implementation", None)
    return ModelInfo(
        name=loaded.name,
        revision=loaded.revision,
        architecture=class_of(seen_through(model)).__name__,
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


_version = functools.cache(metadata.version)  # it reads a file


def versions() -> dict[str, str]:
    """The versions of everything that a figure depends on."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "uncollapse": __version__}
    try:
        found["transformers"] = _version("transformers")
    except (
        metadata.PackageNotFoundError
    ):  # vendored or frozen into a program: a finished measurement is not lost for that
        found["transformers"] = "not installed"
    return found
