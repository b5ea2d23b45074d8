"""What the page and the terminal say about heads: the answer first, then who sees what. Only facts of the record are
repeated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from uncollapse.measures import random_projections
from uncollapse.records.diagnosis import HeadsRecord
from uncollapse.records.heads import IdentifiabilityRecord
from uncollapse.report import wording

YES, CARE, NO = "attributable", "attributable with care", "not attributable"
SIGNS = {YES: "✓", CARE: "!", NO: "✗"}
CLASSES = {YES: "yes", CARE: "care", NO: "no"}
REMEDIES = {
    YES: "Attribute to heads by what they write: uc.head_contributions(model, batch) gives the vectors of each head. Never cut "
    "the output of the projection into heads; by then they are mixed.",
    CARE: "Attribute to heads by what they write (uc.head_contributions), and report its noise gain g: an error ε in the "
    "layer’s output can become g·ε in the part of that head. Average over many tokens, and compare groups of heads "
    "rather than single ones.",
    NO: "Attribute to the whole sublayer, or to those heads that the table of heads still calls attributable. What a head writes "
    "can be recorded before the sum (uc.head_contributions). What the model does with that head alone cannot be known. "
    "In your own model, a position-gated output projection separates heads in training.",
}
# Half the distance between 1 and the next number of the format: the largest relative error of a single rounding.
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
FIRST = (
    "What each head wrote can always be recorded, before the output projection adds the heads up (uc.head_contributions). If "
    "that is your question, you need none of the verdicts below."
)
CAVEAT = (
    "The verdicts are for an observer who sees the output of the layer, as every later layer does. Whether what a head wrote "
    "matters to the model is another question."
)


@dataclass(frozen=True)
class Answer:
    """One verdict, the blocks it holds for, and what to do there."""

    verdict: str
    heads: list[HeadsRecord]

    @property
    def sign(self) -> str:
        return SIGNS.get(self.verdict, "?")

    @property
    def kind(self) -> str:
        """The class in the style sheet."""
        return CLASSES.get(self.verdict, "open")

    @property
    def where(self) -> str:
        return wording.blocks_in_words(self.heads)

    @property
    def remedy(self) -> str:
        return REMEDIES.get(self.verdict, "")

    @property
    def why(self) -> str:
        """The figures that decided the verdict, over these blocks."""
        gains = [record.condition_number for record in self.heads if record.condition_number is not None]
        kernels = [record.kernel_dimension for record in self.heads if record.kernel_dimension]
        if self.verdict == NO and kernels:
            return f"Per token, the output projection loses {_span(kernels)} of the dimensions that its heads write."
        if self.verdict == NO:
            return "Other heads can write what some heads write, up to rounding."
        return f"Relative noise gain {_span(gains)}{_beside(self.heads)}." if gains else ""


def beside_random(gain: float | None, random: Sequence[float] | None) -> str:
    """A gain beside that of random weights, in words; empty where one of them is not known.

    >>> beside_random(44.0, [428.0, 1292.0, 14068.0]), beside_random(None, None)
    ('better than random', '')
    """
    return "" if gain is None or random is None else random_projections.beside_random(gain, random)


def random_range(random: Sequence[float] | None) -> str:
    """What random weights of that size have.

    >>> random_range([428.0, 1292.0, 14068.0])
    '428 to 14,068'
    """
    return "" if random is None else _span([random[0], random[-1]])


def _beside(heads: Sequence[HeadsRecord]) -> str:
    """How many of these blocks do better than random weights, and how many worse."""
    said = [beside_random(record.condition_number, record.random_noise_gain) for record in heads if record.heads > 1]
    counts = [(said.count(word), word) for word in ("better than random", "as random", "worse than random")]
    found = [(amount, word) for amount, word in counts if amount]
    if not found:
        return ""
    ranges = {
        random_range(record.random_noise_gain) for record in heads if record.random_noise_gain and record.heads > 1
    }
    ours = f" ({ranges.pop()})" if len(ranges) == 1 else ""
    if len(found) == 1:
        return f", {found[0][1]}{ours}" if len(said) == 1 else f", all {found[0][1]}{ours}"
    return ", " + ", ".join(f"{amount} {word}" for amount, word in found) + ours


def answers(record: IdentifiabilityRecord) -> list[Answer]:
    """The verdicts that occur, best first."""
    found = wording.verdicts(record.heads)
    return [Answer(verdict, found[verdict]) for verdict in (YES, CARE, NO) if verdict in found]


def unjudged(record: IdentifiabilityRecord) -> list[HeadsRecord]:
    """The attention calls without a verdict."""
    return [heads for heads in record.heads if heads.verdict is None]


def headline(record: IdentifiabilityRecord) -> str:
    """The answer in one line."""
    found = answers(record)
    everywhere = len(found) == 1 and not unjudged(record)
    if not found:
        return "Unknown: no output projection could be read."
    if everywhere:
        place = "every block" if len(record.heads) > 1 else "the only block"
        return {
            YES: f"Yes: in {place} a result can be attributed to single heads.",
            CARE: f"Yes, with care: in {place} the heads can be told apart, but noise is amplified.",
            NO: f"No: in {place} some of what the heads write cannot be told apart.",
        }[found[0].verdict]
    parts = {YES: "yes in {}", CARE: "with care in {}", NO: "not in {}"}
    words = ", ".join(parts[answer.verdict].format(answer.where) for answer in found)
    left = unjudged(record)
    unknown = f"; unknown in {wording.blocks_in_words(left)}" if left else ""
    return f"{words[0].upper()}{words[1:]}{unknown}."


def mark(heads: HeadsRecord) -> Answer:
    """The verdict of one block."""
    return Answer("" if heads.verdict is None else wording.verdict_in_short(heads.verdict), [heads])


def count_of(heads: HeadsRecord, *verdicts: str) -> int | None:
    """How many of the heads have one of these verdicts."""
    if heads.head_verdict is None:
        return None
    return sum(wording.verdict_in_short(verdict) in verdicts for verdict in heads.head_verdict)


def heads_sentences(record: IdentifiabilityRecord) -> list[str]:
    """What holds for single heads, if it differs from the verdict of their block."""
    sentences = []
    total = sum(len(heads.head_verdict or []) for heads in record.heads)
    sums = {v: sum(count_of(heads, v) or 0 for heads in record.heads) for v in (YES, CARE, NO)}
    if total and sum(map(bool, sums.values())) > 1:
        said = [f"{amount:,} {verdict}" for verdict, amount in sums.items() if amount]
        sentences.append(f"Head by head, of {wording.count(total, 'head')}: {', '.join(said)}.")
    some = [heads for heads in record.heads if mark(heads).verdict == NO and count_of(heads, YES, CARE)]
    if some:
        sentences.append(
            f"In {wording.blocks_in_words(some)} some heads can be told from the rest, although the block as a whole is not "
            "attributable. The table of heads lists them."
        )
    forced = [heads for heads in record.heads if heads.heads * heads.head_width > heads.width > 0]
    if forced:
        together, stream = _span([h.heads * h.head_width for h in forced]), _span([h.width for h in forced])
        sentences.append(
            f"In {wording.blocks_in_words(forced)} the heads together are wider ({together}) than the stream ({stream}), so "
            "there is a kernel whatever the weights are."
        )
    if rounding := rounding_sentence(record):
        sentences.append(rounding)
    for heads in unjudged(record):
        reason = heads.unavailable.get("verdict", "no reason was recorded")
        sentences.append(f"No verdict for {wording.blocks_in_words([heads])}: {reason}.")
    return sentences


def rounding_sentence(record: IdentifiabilityRecord) -> str:
    """What the largest noise gain does to the rounding error of the model's own number format; empty if it is not known."""
    gains = [(h.absolute_noise_gain, h) for h in record.heads if h.absolute_noise_gain is not None and h.verdict != YES]
    if not gains or record.model.dtype not in ROUNDING:
        return ""
    gain, where = max(gains, key=lambda pair: pair[0])
    error = gain * ROUNDING[record.model.dtype]
    amount = f"{wording.percent(error)} of" if 1e-3 <= error < 1 else f"{wording.number(error, 2)} times"
    return (
        f"For scale: rounding the layer’s output to {record.model.dtype} can, at worst, become an error of {amount} that "
        f"output’s size in the heads’ contributions ({wording.blocks_in_words([where])})."
    )


def overlap_scale(record: IdentifiabilityRecord) -> str:
    """What the ends of the colour scale of the overlap maps mean: figures, beside those of random weights. The scale ends at the
    largest overlap there is, which need not be large."""
    found = [
        (line[g], heads, g, h)
        for heads in record.heads
        for h, line in enumerate(heads.write_space_overlap or [])
        for g in range(h)
    ]
    if not found:
        return ""
    top, where, g, h = max(found, key=lambda each: each[0])
    sizes = {(heads.head_width, heads.width) for heads in record.heads if heads.write_space_overlap}
    known = [random_projections.random_write_space_overlap(*size) for size in sorted(sizes) if min(size) > 0]
    random = " or ".join(f"{wording.number(mean, 2)} ± {wording.number(spread, 1)}" for mean, spread in known[:3])
    beside = f" Between two heads of random weights it would be {random} (mean ± standard deviation)." if random else ""
    return (
        f"The colours run from 0 to {wording.number(top, 2)}, the largest overlap of two heads here (heads {g} and {h} in "
        f"{wording.blocks_in_words([where])}). An overlap of 1 would be one and the same space.{beside}"
    )


# Who sees what --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observer:
    """One row of the table of observers: who it is, what stays open, and how many numbers that is for this model."""

    who: str
    open: str
    formula: str
    here: str


def observers(record: IdentifiabilityRecord) -> list[Observer]:
    """Who sees what of a layer, and what stays ambiguous, with the figures of this model."""
    lengths = [heads.tokens for heads in record.heads if heads.tokens is not None]
    n = f", n = {_span(lengths)}" if lengths else ""
    return [
        Observer(
            "An observer who sees only the sum of the heads in one shared channel space, without the output projection",
            "everything except the sum (the paper’s count)",
            "n(H − 1)·dₖ",
            _here(record, lambda h: h.ambiguous_degrees_of_freedom, "per token"),
        ),
        Observer(
            "An observer who sees the layer’s output Y, knows W_O and wants the head outputs O_h",
            "what W_O loses",
            "n(D − rank W_O)",
            _here(record, lambda h: h.kernel_dimension, "per token"),
        ),
        Observer(
            "An observer who sees Y, knows W_O and wants the contributions O_hW_h",
            "directions that several heads write",
            "n(Σ rank W_h − rank W_O)",
            _here(record, lambda h: h.contribution_ambiguity, "per token"),
        ),
        Observer(
            "An observer who sees only Y",
            "which pair (O, W_O) has this product",
            f"nD + Dd − r(n + d − r), r = min(n, D, d){n}",
            _here(record, lambda h: h.factorization_ambiguity, "in total"),
        ),
        Observer(
            "An observer who knows what the layer computes, but not how",
            "the basis inside each value head, the order of the heads in a group, and the order of the groups. Queries and keys "
            "have a gauge of their own (uncollapse symmetries)",
            "G·dₖ², + G·dₖ with value and output bias",
            _here(record, lambda h: h.gauge_dimension, "in total"),
        ),
    ]


def _here(record: IdentifiabilityRecord, figure: Callable[[HeadsRecord], int | None], unit: str) -> str:
    """The figure over the blocks: one number if all agree, otherwise up to three with their blocks, otherwise the range."""
    found: dict[int | None, list[HeadsRecord]] = {}
    for heads in record.heads:
        found.setdefault(figure(heads), []).append(heads)
    if len(found) == 1:
        (value,) = found
        return f"{value:,} {unit}" if value is not None else "not known here"
    if len(found) <= 3:
        parts = [
            f"{'not known' if value is None else f'{value:,}'} in {wording.blocks_in_words(blocks)}"
            for value, blocks in found.items()
        ]
        return f"{'; '.join(parts)} ({unit})"
    return f"{_span([value for value in found if value is not None])} {unit}"


def _span(values: Sequence[float]) -> str:
    """One number, or the smallest and the largest.

    >>> _span([16, 16]), _span([2.5, 935.2])
    ('16', '2.50 to 935')
    """
    low, high = wording.number(min(values)), wording.number(max(values))
    return low if low == high else f"{low} to {high}"
