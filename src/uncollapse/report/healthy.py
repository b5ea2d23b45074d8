"""What the same figure is in healthy models: the reference that stands beside a figure on a page and in the terminal.

`healthy.json` holds the lowest and the highest value of each figure in every healthy model of `studies/validity`, as the model is
and on its own input (at most 64 tokens per sequence, 400 frames of speech, or the 256 patches of a picture). `make references`
writes it anew. A record is compared with the models *of its kind*: the same mask (causal or full) and the same place of the
norms, if there are three such models; otherwise with those of the same mask, whatever their norms. So is a run, a sweep, or a
comparison of two models that are of one kind. No model is compared with itself: the one that bears the record's name is left out,
and the page then speaks of "other" healthy models.

A range is what was met, and no threshold: a figure outside it is unusual, and `findings` says what is wrong.

A figure is named after the part of the record and the measure. Ranks are shares of the attainable rank, and energy shares are
multiples of an even share, so that models of different sizes can be compared. The clouds of the corpus were measured over more
sequences (24 to 64), in those models of which there were so many, and have a `references` of their own (`part="corpus"`). None
of these models has a pooling of its own that was trained. So beside one (`corpus.own`) stands what sentence encoders make of the
models' outputs: the mean over the tokens, and the first token, or the last where the mask is causal.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal

from uncollapse.records.anatomy import AnatomyRecord
from uncollapse.records.common import ModelInfo, Statistic
from uncollapse.records.diagnosis import SAMPLED_TOKENS, CorpusRecord, DiagnosisRecord
from uncollapse.records.figures import WORST_IS_LARGEST
from uncollapse.report.wording import count, number

ENOUGH = 3  # models of a kind; with fewer, the place of the norms is not asked for
KNOWN_AS = {  # the last part of the names under which people load them; a model under another name is not recognised
    "gemma3": "gemma-3-270m",
    "minilm": "all-MiniLM-L6-v2",
    "mpnet": "all-mpnet-base-v2",
    "smollm2": "SmolLM2-135M-Instruct",
}
SITE = ("consensus_distance", "consensus_after_norm", "token_similarity", "stream_carried", "rank_gap")
SITE_SHARES = {  # relative to what so many tokens of this width can reach
    "rank": "attainable_rank",
    "affine_rank": "attainable_affine_rank",
    "effective_rank": "attainable_rank",
    "stable_rank": "attainable_rank",
    "participation_ratio": "attainable_rank",
}
WITHOUT_MASSIVE = ("consensus_distance", "token_similarity")
ATTENTION = (
    "normalized_entropy",
    "max_logit",
    "rest_entropy",
    "keys_within_reach",
    "key_share",
    "value_contraction",
    "susceptibility",
    "contraction",
    "spectral_gap",
    "second_singular_value",
)
# Under what name a trail, a sweep or a comparison has a figure of the record. Not the consensus distance: it is that without the
# largest tokens in one model and that with them in another.
PLACES = {
    "consensus_after_norm": "trajectory.consensus_after_norm",
    "stream_carried": "trajectory.stream_carried",
    "effective_rank": "trajectory.effective_rank",
    "affine_rank_share": "trajectory.affine_rank",
    **{
        name: f"attention.{name}"
        for name in ("normalized_entropy", "rest_entropy", "key_share", "max_logit", "value_contraction")
    },
}
CORPUS = (
    "alpha",
    "top_share",
    "top_ten_share",
    "mean_cosine",
    "mean_share",
    "novelty",
    "cka",
    "unbiased_cka",
    "cosine",
)
CORPUS_SHARES = {  # relative to what so many points of this width can reach
    "effective_rank": "attainable_rank",
    "centred_effective_rank": "attainable_centred_rank",
    "participation_ratio": "attainable_centred_rank",
    "stable_rank": "attainable_centred_rank",
    "k90": "attainable_centred_rank",
    "k95": "attainable_centred_rank",
}
UPDATES = ("out_of_span_energy", "nonlinear_innovation", "relative_norm")


@dataclass(frozen=True)
class HealthyModel:
    """One healthy model: what it is, of which kind, and `[lowest, highest]` of each figure over its places."""

    name: str
    about: str
    causal: bool
    norm_placement: str
    ranges: dict[str, list[float]]


@dataclass(frozen=True)
class Range:
    """What a figure was in the healthy models of a kind. `low` and `high` over all their places; `lows` and `highs` are the ranges
    of the models' own lowest and highest values, which is what a lowest or a highest value has to be compared with."""

    low: float
    high: float
    lows: tuple[float, float]
    highs: tuple[float, float]


@functools.cache
def healthy_models() -> tuple[HealthyModel, ...]:
    """The healthy models, in the order of the file."""
    text = resources.files("uncollapse.report").joinpath("healthy.json").read_text(encoding="utf-8")
    return tuple(HealthyModel(**each) for each in json.loads(text))


@dataclass(frozen=True)
class References:
    """The healthy models of one kind. `kind` says which, in words; `input`, on what they were measured."""

    kind: str
    models: tuple[HealthyModel, ...]
    input: str = "at most 64 tokens per sequence, 400 frames of speech or 256 patches of a picture"

    def of(self, figure: str) -> Range | None:
        """The range of a figure; `None` where no model of the kind has it."""
        found = [model.ranges[figure] for model in self.models if figure in model.ranges]
        if not found:
            return None
        lows, highs = ([pair[end] for pair in found] for end in (0, 1))
        return Range(min(lows), max(highs), (min(lows), max(lows)), (min(highs), max(highs)))

    def words(self, figure: str) -> str:
        """The range of a figure in print; empty where there is none."""
        found = self.of(figure)
        return "" if found is None else in_words(found.low, found.high)

    def lowest(self, figure: str) -> str:
        """What the lowest value of a figure is in these models, from model to model."""
        found = self.of(figure)
        return "" if found is None else in_words(*found.lows)

    def highest(self, figure: str) -> str:
        """What the highest value of a figure is in these models, from model to model."""
        found = self.of(figure)
        return "" if found is None else in_words(*found.highs)

    def worst(self, measure: str) -> str:
        """What the worst value of one of `PLACES` is from model to model: the lowest, or the highest where that is the worse. Empty
        where nothing is known, and for ranks, whose share is known and not they themselves."""
        found = self.of(PLACES[measure]) if measure in PLACES and measure != "effective_rank" else None
        if found is None:
            return ""
        ends = found.highs if measure in WORST_IS_LARGEST else found.lows
        return in_percent(*ends) if measure == "affine_rank_share" else in_words(*ends)

    def worst_end(self, measure: str) -> str:
        """The same with the end that it is; empty where nothing is known."""
        words = self.worst(measure)
        return f"{'highest' if measure in WORST_IS_LARGEST else 'lowest'} {words}" if words else ""

    def beside(self, measure: str) -> str:
        """What one of `PLACES` is in these models, over all their places; empty where nothing is known."""
        return self.beside_attainable(PLACES.get(measure, ""))

    def said(self, figures: Mapping[str, str], of_what: str = "") -> str:
        """A sentence for the terminal: what each figure, by its name in print, is in these models; empty where nothing is known of
        any. of_what: whose figures they are, if it is not what was just spoken of."""
        known = [f"{name} {words}" for name, words in figures.items() if words]
        whose = f" ({of_what})" if of_what else ""
        return f"In {self.kind}{whose}: {', '.join(known).replace(' … ', ' to ')}." if known else ""

    def columns(self, part: str) -> dict[str, str]:
        """What stands under the titles of a table: for each measure of a part of the record, the range in these models."""
        figures = {name for model in self.models for name in model.ranges if name.rpartition(".")[0] == part}
        return {figure.rpartition(".")[2]: f"healthy {self.beside_attainable(figure)}" for figure in figures}

    def beside_attainable(self, figure: str) -> str:
        """What a figure is over all places, and a rank as a share of the attainable one; empty where nothing is known."""
        found = self.of(figure)
        shares = CORPUS_SHARES.keys() | {"isoscore"} if figure.startswith("corpus.") else SITE_SHARES.keys()
        if found is not None and figure.rpartition(".")[2] in shares:
            return f"{in_percent(found.low, found.high)} of attainable"
        return self.words(figure)

    @property
    def sentence(self) -> str:
        """What “healthy” means beside a figure."""
        return (
            f"“Healthy” is the range in {self.kind}, each on its own input: {self.input}. A figure outside it is unusual; whether "
            "it is a fault is for the findings to say."
        )


def under_title(words: str) -> str:
    """What stands under the title of a chart, of a range in print; empty where there is none."""
    return f"Healthy models: {words}." if words else ""


def in_percent(low: float, high: float) -> str:
    """A range of shares in percent.

    >>> in_percent(0.554, 0.8), in_percent(1.0, 1.0)
    ('55 … 80 %', '100 %')
    """
    one, other = f"{100 * low:.0f}", f"{100 * high:.0f}"
    return f"{one} %" if one == other else f"{one} … {other} %"


def in_words(low: float, high: float) -> str:
    """A range in print; one number where both look the same.

    >>> in_words(0.0123, 0.9), in_words(1.0, 1.0001)
    ('0.012 … 0.90', '1')
    """
    one, other = (number(float(f"{value:.2g}"), 2) for value in (low, high))
    return one if one == other else f"{one} … {other}"


def references(record: Any, part: Literal["", "corpus"] = "") -> References:
    """The healthy models of the kind of this record's model, without that model itself. part: only those that have figures of it,
    as few have of the corpus."""
    found = _references(record, part)
    return replace(found, input="24 to 64 sequences of at most 64 tokens") if part else found


def _references(record: Any, part: str) -> References:
    measured: list[ModelInfo] = record.models if hasattr(record, "models") else [record.model]
    causal, placements = is_causal(record), {model.norm_placement for model in measured}
    placement = placements.pop() if len(placements) == 1 else None
    names = {model.name.partition("@")[0].rstrip("/").rpartition("/")[2].lower() for model in measured}
    itself = {healthy for healthy, known in KNOWN_AS.items() if known.lower() in names}
    known = tuple(model for model in healthy_models() if any(figure.startswith(part) for figure in model.ranges))
    others = tuple(model for model in known if model.name not in itself)
    noun = "healthy model" if len(others) == len(known) else "other healthy model"
    of_mask = tuple(model for model in others if model.causal is causal)
    both = tuple(model for model in of_mask if model.norm_placement == placement)
    mask = "causal" if causal else "full"
    if causal is None:
        return References(count(len(others), noun), others)
    if len(both) >= ENOUGH:
        return References(f"{count(len(both), noun)} with a {mask} mask and {placement} norm", both)
    return References(f"{count(len(of_mask), noun)} with a {mask} mask", of_mask)


def sentence_of_symmetry(healthy: References, phenomenon: str) -> str:
    """What an order parameter is in healthy models, beside its value at collapse."""
    words = healthy.words(f"symmetries.{phenomenon}")
    return f"Healthy: {words}." if words else ""


def is_causal(record: Any) -> bool | None:
    """Whether tokens see only earlier ones; `None` where no record says, and where one stack does and the other does not."""
    said: bool | None = getattr(record, "is_causal", None)
    anatomy: AnatomyRecord | None = getattr(record, "anatomy", None)
    return said if said is not None or anatomy is None else anatomy.is_causal


def figures(record: DiagnosisRecord) -> dict[str, list[float]]:
    """Every figure that has a reference, with its value at each place of a diagnosis."""
    found: dict[str, list[float]] = {}
    for name, value in _figures(record):
        found.setdefault(name, []).append(value)
    return found


def corpus_figures(clouds: Iterable[CorpusRecord]) -> dict[str, list[float]]:
    """The same of the clouds of the corpus."""
    found: dict[str, list[float]] = {}
    for cloud in clouds:
        for name, value in _corpus_figures(cloud):
            found.setdefault(f"{corpus_part(cloud)}.{name}", []).append(value)
    return found


def corpus_part(cloud: CorpusRecord) -> str:
    """Under what part the figures of a cloud have a reference. A sample of the tokens has fewer directions than all of them. What
    the model pools by itself stands beside outputs of healthy models, pooled as sentence encoders do."""
    is_few = cloud.pooling == "tokens" and cloud.sampled is not None and cloud.sampled <= SAMPLED_TOKENS
    return f"corpus.{'few tokens' if is_few else cloud.pooling}"


def _corpus_figures(cloud: CorpusRecord) -> Iterator[tuple[str, float]]:
    read: Callable[[Any, str], float | None] = getattr
    for name in CORPUS:
        value = read(cloud, name)
        if value is not None:
            yield name, value
    for name, attainable in CORPUS_SHARES.items():
        value, most = read(cloud, name), read(cloud, attainable)
        if value is not None and most:
            yield name, value / most
    if cloud.isoscore is not None and cloud.attainable_centred_rank > 1:  # (PR - 1) / (d - 1)
        yield "isoscore", cloud.isoscore * (cloud.width - 1) / (cloud.attainable_centred_rank - 1)


def _figures(record: DiagnosisRecord) -> Iterator[tuple[str, float]]:
    yield from _means("trajectory", SITE, record.trajectory)
    for rank, attainable in SITE_SHARES.items():
        for site in record.trajectory:
            reached, most = getattr(site, rank), getattr(site, attainable)
            if reached is not None and most is not None and most.mean:
                yield f"trajectory.{rank}", reached.mean / most.mean
    left_out = [site.massive_tokens_left_out for site in record.trajectory if site.massive_tokens_left_out is not None]
    yield from _means("left_out", WITHOUT_MASSIVE, left_out)
    yield from _means("attention", ATTENTION, record.attention)
    for heads in record.heads:
        if heads.condition_number is not None:
            yield "heads.condition_number", heads.condition_number
        if heads.heads > 1 and heads.write_space_overlap:
            pairs = [heads.write_space_overlap[g][h] for g in range(heads.heads) for h in range(g)]
            yield "heads.largest_overlap", max(pairs)
        shares = [share.mean for share in heads.energy_share or [] if share is not None]
        if shares:
            yield "heads.largest_energy_share", max(shares) * heads.heads
    for symmetry in record.symmetries:
        for value in symmetry.order_parameter:
            if value is not None:
                yield f"symmetries.{symmetry.phenomenon}", value.mean
    for sublayer in ("attention", "mlp"):
        yield from _means(f"updates.{sublayer}", UPDATES, [u for u in record.updates if u.sublayer == sublayer])


def _means(part: str, measures: Iterable[str], records: Iterable[Any]) -> Iterator[tuple[str, float]]:
    read: Callable[[Any, str], Statistic | None] = getattr
    for one in records:
        for measure in measures:
            value = read(one, measure)
            if value is not None:
                yield f"{part}.{measure}", value.mean
