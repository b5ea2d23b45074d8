"""What a page and a terminal say of heads: the answer first, then who sees what. Only facts of the record are repeated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from uncollapse.records.diagnosis import HeadsRecord
from uncollapse.records.heads import IdentifiabilityRecord
from uncollapse.report import wording

YES, CARE, NO = "attributable", "attributable with care", "not attributable"
SIGNS = {YES: "✓", CARE: "!", NO: "✗"}
CLASSES = {YES: "yes", CARE: "care", NO: "no"}
REMEDIES = {
    YES: "Attribute to heads by what they write: uc.head_contributions(model, batch) gives each head’s vectors. Never cut the "
    "projection’s output into heads: that is after the mixing.",
    CARE: "Attribute to heads by what they write (uc.head_contributions), and state the noise gain g: an error ε in the layer’s "
    "output can be g·ε in one head’s part. Average over many tokens, and compare groups of heads rather than single ones.",
    NO: "Attribute to the whole sublayer, or to the single heads that the table of heads still calls attributable. What a head "
    "writes can be recorded before the sum (uc.head_contributions); what the model makes of that head alone cannot be told. "
    "In a model of your own, a position-gated output projection separates heads in training.",
}
# Half the distance between 1 and the next number of the format: the largest relative error of one rounding.
ROUNDING = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
CAVEAT = (
    "This is about who sees a layer’s output, as every later layer does. Whoever records the heads before the output "
    "projection knows what each one wrote in any case; whether it matters is another question."
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
        """The class of the style sheet."""
        return CLASSES.get(self.verdict, "open")

    @property
    def where(self) -> str:
        return wording.blocks_in_words(self.heads)

    @property
    def remedy(self) -> str:
        return REMEDIES.get(self.verdict, "")

    @property
    def why(self) -> str:
        """The figures that decided, over these blocks."""
        gains = [record.condition_number for record in self.heads if record.condition_number is not None]
        kernels = [record.kernel_dimension for record in self.heads if record.kernel_dimension]
        if self.verdict == NO and kernels:
            return f"The output projection forgets {_span(kernels)} of the dimensions that its heads write a token."
        if self.verdict == NO:
            return "What some heads write can be made good by others, to within rounding."
        return f"Noise gain {_span(gains)}." if gains else ""


def answers(record: IdentifiabilityRecord) -> list[Answer]:
    """The verdicts that occur, the best first."""
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
        place = "every block" if len(record.heads) > 1 else "its one block"
        return {
            YES: f"Yes: in {place} a result can be attributed to single heads.",
            CARE: f"Yes, with care: in {place} heads can be told apart, but noise is amplified.",
            NO: f"No: in {place} some of what the heads write cannot be told apart.",
        }[found[0].verdict]
    parts = {YES: "yes in {}", CARE: "with care in {}", NO: "not in {}"}
    words = ", ".join(parts[answer.verdict].format(answer.where) for answer in found)
    left = unjudged(record)
    unknown = f"; unknown in {wording.blocks_in_words(left)}" if left else ""
    return f"{words[0].upper()}{words[1:]}{unknown}."


def mark(heads: HeadsRecord) -> Answer:
    """The verdict of one block by itself."""
    return Answer("" if heads.verdict is None else wording.verdict_in_short(heads.verdict), [heads])


def count_of(heads: HeadsRecord, *verdicts: str) -> int | None:
    """How many of the heads have one of these verdicts."""
    if heads.head_verdict is None:
        return None
    return sum(wording.verdict_in_short(verdict) in verdicts for verdict in heads.head_verdict)


def heads_sentences(record: IdentifiabilityRecord) -> list[str]:
    """What holds for single heads where it differs from their block."""
    sentences = []
    total = sum(len(heads.head_verdict or []) for heads in record.heads)
    sums = {v: sum(count_of(heads, v) or 0 for heads in record.heads) for v in (YES, CARE, NO)}
    if total and sum(map(bool, sums.values())) > 1:
        said = [f"{amount:,} {verdict}" for verdict, amount in sums.items() if amount]
        sentences.append(f"Of {wording.count(total, 'head')} taken singly: {', '.join(said)}.")
    some = [heads for heads in record.heads if mark(heads).verdict == NO and count_of(heads, YES, CARE)]
    if some:
        sentences.append(
            f"In {wording.blocks_in_words(some)} single heads can be told from the rest although the block as a whole cannot: "
            "the table of heads names them."
        )
    forced = [heads for heads in record.heads if heads.heads * heads.head_width > heads.width > 0]
    if forced:
        together, stream = _span([h.heads * h.head_width for h in forced]), _span([h.width for h in forced])
        sentences.append(
            f"In {wording.blocks_in_words(forced)} the heads together are wider ({together}) than the stream ({stream}): the "
            "architecture forces a kernel, whatever the weights."
        )
    if rounding := rounding_sentence(record):
        sentences.append(rounding)
    for heads in unjudged(record):
        reason = heads.unavailable.get("verdict", "no reason was recorded")
        sentences.append(f"No verdict for {wording.blocks_in_words([heads])}: {reason}.")
    return sentences


def rounding_sentence(record: IdentifiabilityRecord) -> str:
    """What the largest noise gain makes of the rounding of the model's own number format; empty where nothing is known."""
    gains = [(h.condition_number, h) for h in record.heads if h.condition_number is not None and h.verdict != YES]
    if not gains or record.model.dtype not in ROUNDING:
        return ""
    gain, where = max(gains, key=lambda pair: pair[0])
    error = gain * ROUNDING[record.model.dtype]
    amount = f"{wording.percent(error)} of it" if 1e-3 <= error < 1 else f"{wording.number(error, 2)} times its size"
    return (
        f"For scale: rounding the layer’s output to {record.model.dtype} can, at worst, become {amount} in one head’s part "
        f"({wording.blocks_in_words([where])})."
    )


# Who sees what --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observer:
    """One row of the table of observers: who, what stays open, how many numbers that is here."""

    who: str
    open: str
    formula: str
    here: str


def observers(record: IdentifiabilityRecord) -> list[Observer]:
    """Who sees what of a layer, and what stays ambiguous, with this model's figures."""
    lengths = [heads.tokens for heads in record.heads if heads.tokens is not None]
    n = f", n = {_span(lengths)}" if lengths else ""
    return [
        Observer(
            "sees the heads added up in one shared channel space, without the output projection",
            "everything but the sum: the paper’s count",
            "n(H − 1)·dₖ",
            _here(record, lambda h: h.ambiguous_degrees_of_freedom, "a token"),
        ),
        Observer(
            "sees the layer’s output Y, knows W_O, asks for the head outputs O_h",
            "what W_O forgets",
            "n(D − rank W_O)",
            _here(record, lambda h: h.kernel_dimension, "a token"),
        ),
        Observer(
            "sees Y, knows W_O, asks for the contributions O_hW_h",
            "directions that several heads write",
            "n(Σ rank W_h − rank W_O)",
            _here(record, lambda h: h.contribution_ambiguity, "a token"),
        ),
        Observer(
            "sees Y alone",
            "every pair (O, W_O) with this product",
            f"nD + Dd − r(n + d − r), r = min(n, D, d){n}",
            _here(record, lambda h: h.factorization_ambiguity, "in all"),
        ),
        Observer(
            "knows what the layer computes, not how",
            "the basis inside each value head, and the order of the heads in a group and of the groups; queries and keys have "
            "a gauge of their own (uncollapse symmetries)",
            "G·dₖ², + G·dₖ with value and output bias",
            _here(record, lambda h: h.gauge_dimension, "in all"),
        ),
    ]


def _here(record: IdentifiabilityRecord, figure: Callable[[HeadsRecord], int | None], unit: str) -> str:
    """The figure over the blocks: one number where all agree, else each with its blocks, at most three of them."""
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
