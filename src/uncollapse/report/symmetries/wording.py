"""How the four symmetries are put into plain words, shared by their page, the page of a diagnosis, and the terminal.

What is exact and what is broken was decided when the model ran; here it is only repeated. There are no thresholds here: the
findings decide whether a distance from collapse is dangerous.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from uncollapse.records.common import Phenomenon, Statistic
from uncollapse.records.symmetries import SymmetriesRecord, SymmetryRecord, SymmetryTest, WidthScaling
from uncollapse.report import wording
from uncollapse.report.page.cells import NO_REASON
from uncollapse.report.wording import NAMES, listed


@dataclass(frozen=True)
class Explained:
    """One phenomenon: what a complete collapse looks like, the symmetry behind it, what that means in practice, and what the
    figures at one place are taken over.
    """

    collapse: str
    symmetry: str
    practice: str
    over: str


EXPLAINED: dict[Phenomenon, Explained] = {
    "rank-collapse-depth": Explained(
        "All tokens of a sequence have become the same vector.",
        "Attention, MLP, norm and residual treat all tokens in the same way. If you reorder the tokens, the output is reordered "
        "and does not change otherwise. Equal tokens stay equal.",
        "If this symmetry is exact, the model cannot know the order of its input. Positions and masks break it. But they do not "
        "separate tokens that have become equal: that takes positions added again, or attention whose rows do not sum to one.",
        "sequence",
    ),
    "rank-collapse-width": Explained(
        "Every token receives the same average over all others, whatever its query is.",
        "Attention that gives all keys equal weight does not change if the keys are reordered and the queries are not.",
        "No trained model has this symmetry exactly. Untrained attention approaches it as the context grows. So a defect near 0 "
        "means that attention does little more than average.",
        "head",
    ),
    "head-channel-non-identifiability": Explained(
        "The heads are interchangeable: the output of the layer does not show which head wrote what.",
        "Heads can be swapped, and the values inside a head can be mixed if the output projection undoes it. The weights change, "
        "the function does not.",
        "If this symmetry is exact, a single channel of a head has no meaning of its own, and training cannot tell the equivalent "
        "solutions apart. The dimension counts the directions in which the weights can move without changing the function.",
        "pair of heads",
    ),
    "entropy-collapse": Explained(
        "Every token looks at a single key, and no gradient passes through its softmax any more.",
        "Adding a constant to all logits of a row changes nothing. Multiplying them does: as the factor grows, every row moves "
        "onto its largest logit and stays there.",
        "Shifting the logits is an exact symmetry. So is scaling the queries up and the keys down: only the size of their product "
        "matters, and training can make it grow. Scaling the logits is not a symmetry; its defect says how much sharpness matters.",
        "head",
    ),
}
BREAKERS = "Breakers are parts that do not respect the symmetry."
STABILISERS = "Stabilisers respect it and still keep the model away from the collapse."
LONE_PLACE = re.compile(r"(?:(?:encoder|decoder)\.)?(?:embedding|block\.(\d+))(?:\.cross)?")


def place(name: str) -> str:
    """A place of an order parameter in words.

    >>> place("block.3.cross"), place("decoder.embedding"), place("block.0"), place("somewhere")
    ('block 3 (cross)', 'decoder embedding', 'block 0', 'somewhere')
    """
    if not LONE_PLACE.fullmatch(name):
        return name
    words = name.removesuffix(".cross").replace(".", " ")
    return f"{words} (cross)" if name.endswith(".cross") else words


def block_of(name: str) -> int | None:
    """The block that a place is in; `None` for the input of the first block.

    >>> block_of("block.12.cross"), block_of("embedding")
    (12, None)
    """
    found = LONE_PLACE.fullmatch(name)
    return int(found[1]) if found and found[1] else None


def measure(symmetry: SymmetryRecord) -> str:
    """What the order parameter is, with a real minus sign."""
    return symmetry.measure.replace(" - ", " − ")


def line(name: str, first_decoder_block: int | None) -> str:
    """Which line along depth a place belongs to: the stack, if there are two, and whether it is cross-attention.

    >>> line("block.5.cross", 4), line("embedding", 4), line("block.5", None)
    ('decoder cross-attention', 'encoder', '')
    """
    block = block_of(name)
    kind = "cross-attention" if LONE_PLACE.fullmatch(name) and name.endswith(".cross") else ""
    if first_decoder_block is None:
        return kind
    is_behind = block is not None and block >= first_decoder_block
    return f"{'decoder' if is_behind or name.startswith('decoder') else 'encoder'} {kind}".rstrip()


def first_decoder_block(symmetries: Sequence[SymmetryRecord]) -> int | None:
    """Blocks are counted through both stacks; the first block of the decoder follows its embedding. `None` with one stack."""
    for symmetry in symmetries:
        if "decoder.embedding" in symmetry.places:
            behind = symmetry.places[symmetry.places.index("decoder.embedding") + 1 :]
            return next((block for name in behind if (block := block_of(name)) is not None), None)
    return None


def measured(symmetry: SymmetryRecord) -> list[tuple[str, Statistic]]:
    """The places that have an order parameter, in words, each with its value."""
    pairs = zip(symmetry.places, symmetry.order_parameter, strict=True)
    return [(place(name), value) for name, value in pairs if value is not None]


def distance(value: float, symmetry: SymmetryRecord) -> float:
    """How far a value of the order parameter is from its value at collapse."""
    return abs(value - symmetry.collapsed_value)


def nearest(symmetry: SymmetryRecord) -> tuple[str, Statistic] | None:
    """Where the mean order parameter is nearest to its value at collapse."""
    return min(measured(symmetry), key=lambda pair: distance(pair[1].mean, symmetry), default=None)


def nearest_extreme(symmetry: SymmetryRecord) -> tuple[str, float] | None:
    """The sequence, head or pair of heads that is nearest to collapse, and where."""
    ends = [(where, value) for where, s in measured(symmetry) for value in (s.min, s.max)]
    return min(ends, key=lambda pair: distance(pair[1], symmetry), default=None)


def reason(record: SymmetryRecord | SymmetryTest, key: str) -> str:
    """Why a value is absent."""
    return record.unavailable.get(key, NO_REASON)


def course(symmetry: SymmetryRecord, decoder_from: int | None = None) -> str:
    """How the order parameter changes along depth, for each stack and kind of attention. `decoder_from` is the first block of
    the decoder if the model also has an encoder.

    >>> record = SymmetryRecord("rank-collapse-depth", "S_n", None, "consensus distance", ["embedding", "block.0"],
    ...     [Statistic(0.97, 0.9, 1.0, 4), Statistic(0.88, 0.7, 0.9, 4)], 0.0, None, [], [])
    >>> course(record)
    'From 0.970 at the embedding to 0.880 at block 0; collapse is at 0.'
    """
    lines: dict[str, list[tuple[str, Statistic]]] = {}
    for name, value in zip(symmetry.places, symmetry.order_parameter, strict=True):
        if value is not None:
            lines.setdefault(line(name, decoder_from), []).append((place(name), value))
    if not lines:
        return f"Not measured: {reason(symmetry, 'order_parameter')}."
    parts = [
        (f"{name or 'self-attention'}: " if len(lines) > 1 else "") + _from_to(seen) for name, seen in lines.items()
    ]
    words = "; ".join([*parts, f"collapse is at {wording.number(symmetry.collapsed_value)}."])
    return words[:1].upper() + words[1:]


def _from_to(seen: Sequence[tuple[str, Statistic]]) -> str:
    (start, first), (end, last) = seen[0], seen[-1]
    if len(seen) == 1:
        return f"{wording.mean(first)} at {_the(start)}"
    if wording.mean(first) == wording.mean(last):
        return f"{wording.mean(first)} at {_the(start)} and at {_the(end)}"
    return f"from {wording.mean(first)} at {_the(start)} to {wording.mean(last)} at {_the(end)}"


def _the(where: str) -> str:
    return where if where.startswith("block") else f"the {where}"


def closest(symmetry: SymmetryRecord) -> str:
    """Where this model is nearest to collapse, on average and at worst; empty if nothing was measured."""
    mean, extreme = nearest(symmetry), nearest_extreme(symmetry)
    if mean is None or extreme is None:
        return ""
    words = f"Nearest to collapse: {wording.mean(mean[1])} at {_the(mean[0])}"
    if wording.number(extreme[1]) != wording.mean(mean[1]):
        over = EXPLAINED[symmetry.phenomenon].over if symmetry.phenomenon in EXPLAINED else "value"
        words += f"; nearest {over}: {wording.number(extreme[1])}"
        words += "" if extreme[0] == mean[0] else f" at {_the(extreme[0])}"
    return f"{words}."


def defect(symmetry: SymmetryRecord) -> str:
    """How far the model as it is departs from the symmetry."""
    if symmetry.equivariance_defect is None:
        return f"Defect: {reason(symmetry, 'equivariance_defect')}."
    spread = wording.spread(symmetry.equivariance_defect)
    return (
        f"Defect of the model as it is: {wording.mean(symmetry.equivariance_defect)}{f' ({spread})' if spread else ''}."
    )


# Tests ----------------------------------------------------------------------------------------------------------------

OUTCOMES = {
    "exact": "exact",
    "broken": "broken",
    "none": "not a symmetry",
    "open": "undecided",
    "untested": "cannot be tested",
}
SIGNS = {"exact": "=", "broken": "≠", "none": "~", "open": "?", "untested": "–"}


def outcomes(tests: Sequence[SymmetryTest], symmetries: Sequence[SymmetryRecord]) -> list[str]:
    """The outcome of each test: keys of `OUTCOMES`."""
    held = {symmetry.phenomenon: symmetry.breakers for symmetry in symmetries}
    return [_outcome(test, tests, held.get(test.phenomenon, [])) for test in tests]


def _outcome(test: SymmetryTest, tests: Sequence[SymmetryTest], breakers: Sequence[str]) -> str:
    """Some actions are symmetries only once components are removed. If some of them are left, the breakers among them break
    the symmetry. If a single one is left and it was found not to be a breaker, the symmetry is exact.
    """
    if test.defect is None:
        return "untested"
    if test.holds:
        return "exact"
    if test.is_symmetry:
        return "open" if test.holds is None else "broken"
    exact = [each.without for each in tests if each.action == test.action and each.holds]
    if not exact:
        return "none"
    fewest = min(exact, key=len)
    left = set(fewest) - set(test.without)
    if test.holds is False or left & set(breakers):
        return "broken"
    return "exact" if len(left) == 1 else "open"


def components(names: Sequence[str]) -> str:
    """Components in words."""
    return listed([NAMES.get(name, name) for name in names])


def acted(test: SymmetryTest) -> str:
    """What was done to the model.

    >>> acted(SymmetryTest("rank-collapse-depth", "token permutation", True, "S_n", None, ["mask"], None, None, None))
    'token permutation, without mask'
    """
    return f"{test.action}, without {components(test.without)}" if test.without else test.action


def found(test: SymmetryTest, outcome: str) -> str:
    """The outcome in a sentence."""
    match outcome:
        case "exact":
            return "The model does not notice: the defect is at the level of rounding."
        case "broken":
            return f"The model notices: the defect is {above_rounding(test)}."
        case "none":
            return f"Not a symmetry in theory either: the output changes by {wording.mean(test.defect)} of its size."
        case "open":
            return f"Undecided whether that is more than rounding: the defect is {above_rounding(test)}."
        case _:
            return f"Cannot be tested: {reason(test, 'defect')}."


def above_rounding(test: SymmetryTest) -> str:
    """How the defect compares with rounding."""
    if test.defect is None or test.rounding is None or test.rounding.mean <= 0:
        return f"{wording.mean(test.defect)}; rounding was not measured"
    return f"{wording.number(float(f'{test.defect.mean / test.rounding.mean:.1e}'), 2)} times the level of rounding"


def survives(test: SymmetryTest) -> str:
    """Which subgroup this architecture leaves, and its dimension if that is not 0."""
    return test.surviving + (f" ({wording.count(test.dimension, 'dimension')})" if test.dimension else "")


def in_one_line(tests: Sequence[tuple[SymmetryTest, str]]) -> list[tuple[str, str, int]]:
    """For each action its outcome on the model as it is and, if it is broken, the smallest set of components without which it
    is exact. `tests`: each with its outcome. Each line comes with the key of the outcome and the number of its test.
    """
    lines = []
    by_action: dict[str, list[int]] = {}
    for number, (test, _) in enumerate(tests):
        by_action.setdefault(test.action, []).append(number)
    for numbers in by_action.values():
        first = next((n for n in numbers if not tests[n][0].without), numbers[0])
        test, kind = tests[first]
        words = f"{acted(test)}: {OUTCOMES[kind]}"
        mended = [tests[n][0].without for n in numbers if tests[n][0].without and tests[n][1] == "exact"]
        if kind == "broken" and mended:
            fewest = min(map(len, mended))
            words += f", exact without {' or without '.join(components(w) for w in mended if len(w) == fewest)}"
        lines.append((kind, words, first))
    return lines


def counted(outcomes: Sequence[str]) -> str:
    """How many tests had which outcome; empty if there were none.

    >>> counted(["untested", "exact", "exact"])
    '3 tests: 2 exact, 1 cannot be tested.'
    """
    parts = [f"{outcomes.count(kind)} {words}" for kind, words in OUTCOMES.items() if kind in outcomes]
    return f"{wording.count(len(outcomes), 'test')}: {', '.join(parts)}." if parts else ""


def headline(record: SymmetriesRecord) -> str:
    """What was found, in a sentence or two."""
    tests = counted(outcomes(record.tests, record.symmetries))
    return " ".join(filter(None, [wording.headline(record.findings, wording.looked_at(record)), tests]))


# Width ----------------------------------------------------------------------------------------------------------------


def interval(scaling: WidthScaling) -> str:
    """The 95 % interval of the slope in brackets; empty if there is none."""
    if scaling.slope_low is None or scaling.slope_high is None:
        return ""
    return f"[{signed(scaling.slope_low)}, {signed(scaling.slope_high)}]"


def signed(value: float | None) -> str:
    """A slope with two decimals and a real minus sign.

    >>> signed(-0.4831), signed(0.02), signed(None)
    ('−0.48', '0.02', '–')
    """
    if value is None:
        return wording.ABSENT
    return f"{value + 0.0:.2f}".replace("-0.00", "0.00").replace("-", "−")


def slope(scaling: WidthScaling) -> str:
    """The slope and its interval."""
    return " ".join(filter(None, [signed(scaling.slope), interval(scaling)]))


def attention(scaling: WidthScaling) -> str:
    """Which attention it is."""
    return wording.place(block=scaling.block, stack=scaling.stack, kind=scaling.kind)


def regimes(scaling: Sequence[WidthScaling]) -> list[tuple[str, list[WidthScaling]]]:
    """The attention calls of each regime, in the order in which the regimes appear."""
    found: dict[str, list[WidthScaling]] = {}
    for each in scaling:
        found.setdefault(each.regime, []).append(each)
    return list(found.items())


def slopes(symmetry: SymmetryRecord) -> str:
    """How the second singular value changes with the context length, in a sentence."""
    if symmetry.slope is None:
        return f"Slope in the context length: {reason(symmetry, 'slope')}."
    spread = [signed(symmetry.slope.min), signed(symmetry.slope.max)]
    over = f", from {spread[0]} to {spread[1]}" if spread[0] != spread[1] else ""
    calls = wording.count(symmetry.slope.n, "attention layer")
    return (
        f"σ₂ changes with the context length n as n to the power {signed(symmetry.slope.mean)} (mean of {calls}{over})."
    )
