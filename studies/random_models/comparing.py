"""The package's figures of one random model against what the model itself recorded.

The references are written here, in NumPy and float64, from the definitions in `uncollapse.geometry` and `uncollapse.mixing`.
None of the package's own functions is used for them.

Every item (a figure of one block, one `without`) gets a verdict:

* `right`: it is the truth, within what the number format allows;
* `unavailable`: null, with a reason;
* `refused`: an `UncollapseError`;
* `wrong`: another number, another output, a figure without a reason for its absence, nothing removed without a word, or an
  exception that is no `UncollapseError`.

Where there is no truth (the entropy of a difference of softmaxes, the mask of a model without one) null or a refusal is right.
So it is where the documentation says that it is not done: positions of a model that is not told them from outside, figures of
what is no softmax. Where the effect of a removal drowns in the number format nothing is said (`indistinct`).
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import gc
import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

import uncollapse as uc
from studies.random_models.drawing import HALVES, Drawn, drawn, reconciled, written_out
from studies.random_models.specification import DIFFERENCES, NO_SOFTMAX, Specification
from studies.random_models.truth import PARTS, AttentionTruth, Truth

LEAST_WEIGHT = 1e-30  # of a pair that is not forbidden
FEW_KEYS, FEW_RIVALS = 4, 16  # rows over fewer keys have no key share, no rest entropy (`uncollapse.mixing`)
VERDICTS = ("right", "unavailable", "refused", "wrong")
ATTENTION_FIGURES = (
    "entropy",
    "normalized_entropy",
    "key_share",
    "rest_entropy",
    "max_logit",
    "entropy_floor",
    "value_contraction",
)
OF_LOGITS = ("max_logit", "entropy_floor")
FULL_FIGURES = ("susceptibility", "contraction", "spectral_gap", "second_singular_value")
SITE_FIGURES = ("effective_rank", "stable_rank", "participation_ratio", "consensus_distance", "token_similarity")


@dataclass(frozen=True)
class Tolerance:
    """What a number format allows: of a figure (relative to its size or 1), and of an output (relative, root mean square)."""

    figure: float
    output: float


TOLERANCES = {
    "float32": Tolerance(1e-4, 1e-4),
    "float64": Tolerance(1e-8, 1e-8),
    "float64, softmax in float32": Tolerance(1e-5, 1e-5),
    "bfloat16": Tolerance(3e-2, 3e-2),  # 8 bits a number, some dozens of operations
    "float16": Tolerance(4e-3, 4e-3),  # 11 bits a number
}


def tolerance(spec: Specification) -> Tolerance:
    """That of a model's number format."""
    if spec.wrapper == "autocast":
        return TOLERANCES["bfloat16"]
    coarse = spec.dtype == "float64" and (spec.softmax == "float32" or spec.positions.startswith("rotary"))
    return TOLERANCES["float64, softmax in float32" if coarse else spec.dtype]


@dataclass(frozen=True)
class Item:
    """One thing that was compared, with what was expected and what came."""

    name: str
    verdict: str
    detail: str = ""


@dataclass
class Comparison:
    """All items of one model."""

    seed: int
    pieces: Mapping[str, str]
    items: list[Item] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """The worst: `wrong`, `refused` (the whole model), `unavailable` (some figure or removal), or `right`."""
        found = {item.verdict for item in self.items}
        if "wrong" in found:
            return "wrong"
        if any(item.name == "diagnose" and item.verdict == "refused" for item in self.items):
            return "refused"
        return "unavailable" if found & {"unavailable", "refused"} else "right"

    def add(self, name: str, verdict: str, detail: str = "") -> None:
        """One more item."""
        self.items.append(Item(name, verdict, detail))


# References ------------------------------------------------------------------------------------------------------------


def site_reference(x: np.ndarray) -> dict[str, float]:
    """The cloud [token, width] of one sequence's real tokens, by the definitions in `geometry`."""
    nothing = dict.fromkeys(SITE_FIGURES, math.nan)
    if not np.isfinite(x).all() or not x.any():
        return nothing
    sigma = np.linalg.svd(x, compute_uv=False)
    p = sigma[sigma > 0] / sigma.sum()
    norms = np.linalg.norm(x, axis=1)
    unit = x[norms > 0] / norms[norms > 0, None]
    pairs = unit @ unit.T
    n = len(unit)
    return {
        "effective_rank": float(np.exp(-(p * np.log(p)).sum())),
        "stable_rank": float((sigma**2).sum() / sigma[0] ** 2),
        "participation_ratio": float((sigma**2).sum() ** 2 / (sigma**4).sum()),
        "consensus_distance": float(np.linalg.norm(x - x.mean(0)) / np.linalg.norm(x)) if len(x) > 1 else math.nan,
        "token_similarity": float((pairs.sum() - np.trace(pairs)) / (n * (n - 1))) if n > 1 else math.nan,
    }


def entropy(row: np.ndarray) -> float:
    """In nats, of a row of weights that is scaled to sum to one."""
    p = row / row.sum()
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def head_reference(
    one: AttentionTruth, real: np.ndarray, sequence: int, head: int, spec: Specification | None = None
) -> dict[str, float]:
    """One head on one sequence, by the definitions in `mixing`: per row first, then over the rows."""
    rows = np.flatnonzero(real[sequence])
    found: dict[str, list[float]] = collections.defaultdict(list)
    weights, allowed, all_values, all_mixed = one.found()
    weights = weights if one.scaled is None else one.scaled
    # A mask of -100 beside logits in the hundreds (a model without its norms) forbids little: as the documentation has it, a
    # forbidden pair has no weight, or is not forbidden. "No weight" is a share of the row's largest, whatever a sink takes.
    seen = real[sequence][:, None]  # a padded key that keeps some weight is seen as well
    is_soft = spec is None or spec.forbidden in {"-100", "-1e4", "-1e9"}
    logits, pairs = one.logits, allowed[sequence, 0]
    leaks = seen & ~pairs & (weights[sequence, head] > LEAST_WEIGHT * weights[sequence, head].max(-1, keepdims=True))
    if is_soft and leaks.any():
        if logits is not None and spec is not None:  # what the softmax saw of such a pair
            number = float(spec.forbidden)
            logits = np.where(allowed, logits, logits + number if spec.masking.startswith("added") else number)
        pairs = pairs | leaks
    for i in rows:
        keys = np.flatnonzero(pairs[i])
        row = weights[sequence, head, i, keys]
        if logits is not None:
            found["max_logit"].append(logits[sequence, head, i, keys].max())
        if (row < 0).any() or not row.sum() > 0:
            continue
        H, T = entropy(row), len(keys)
        found["entropy"].append(H)
        if T > 1:
            found["normalized_entropy"].append(H / math.log(T))
        if T >= FEW_KEYS:
            found["key_share"].append((math.exp(H) - 1) / (T - 1))
        if T >= FEW_RIVALS:
            others = np.delete(row, row.argmax())
            if not others.sum() > 0 and logits is not None and not (spec and spec.masking.startswith("after")):
                scores = np.delete(logits[sequence, head, i, keys], row.argmax())
                others = np.exp(scores - scores.max())
            if others.sum() > 0:  # weights that have all underflowed say nothing about each other
                found["rest_entropy"].append(entropy(others) / math.log(T - 1))
    figures = {name: float(np.mean(values)) for name, values in found.items()}
    if found["max_logit"]:
        figures["max_logit"] = max(found["max_logit"])
    if one.kind == "difference":  # no distribution, hence no entropy, whatever the signs on this text
        figures = {}
    values, mixed = (t[sequence, head][real[sequence]] for t in (all_values, all_mixed))
    spread = np.linalg.norm(values - values.mean(0))
    if spread <= 1e-5 * np.linalg.norm(values):
        figures["value_contraction"] = math.inf  # equal values: the ratio is one of roundings, and is not compared
    else:
        figures["value_contraction"] = float(np.linalg.norm(mixed - mixed.mean(0)) / spread)
    if figures.get("entropy") is not None:
        figures |= _whole_reference(weights[sequence, head], pairs, rows)
    return {name: figures.get(name, math.nan) for name in (*ATTENTION_FIGURES, *FULL_FIGURES)}


def _whole_reference(weights: np.ndarray, allowed: np.ndarray, rows: np.ndarray) -> dict[str, float]:
    """Of one matrix [query, key] over its real tokens `rows`, each row scaled to sum to one; NaN where a row is nothing."""
    A = np.where(allowed, weights, 0)[np.ix_(rows, rows)]
    A = A / A.sum(-1, keepdims=True)
    found, n = {}, len(rows)
    if np.isfinite(A).all():
        C = np.eye(n) - 1 / n
        found["contraction"] = float(np.linalg.norm(C @ A @ C, 2))
        if n > 1:
            sigma = np.linalg.svd(A, compute_uv=False)
            found |= {"spectral_gap": float(1 - sigma[1] / sigma[0]), "second_singular_value": float(sigma[1])}
    A = A[np.isfinite(A).all(-1)]  # a row without any weight has no entropy either
    S = np.log(np.where(A > 0, A, 1))
    found["susceptibility"] = float(((A * S**2).sum(-1) - (A * S).sum(-1) ** 2).mean()) if len(A) else math.nan
    return found


def head_energies(one: AttentionTruth, real: np.ndarray, sequence: int) -> np.ndarray:
    """Each head's share of the energy of the centred contributions on one sequence."""
    written = one.contributions[sequence][real[sequence]]
    energy = ((written - written.mean(0)) ** 2).sum((0, 2))
    return energy / energy.sum() if energy.sum() > 0 else np.full(len(energy), math.nan)


def summary(values: Sequence[float]) -> tuple[float, float, float, int] | None:
    """(mean, min, max, n) over sequences; None where no sequence has the figure."""
    found = [v for v in values if math.isfinite(v)]
    return (float(np.mean(found)), min(found), max(found), len(found)) if found else None


# Comparing -------------------------------------------------------------------------------------------------------------


def compared(spec: Specification | int) -> Comparison:
    """Ask the package everything about one random model."""
    begun = time.perf_counter()
    subject = _finite(drawn(spec))
    result = Comparison(subject.spec.seed, subject.spec.pieces)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truths = [subject.truth(batch) for batch in subject.batches]
        _compare_written_out(subject, truths, result)
        _compare(subject, truths, result)
    if subject.spec.seed % 10 == 0:
        model = weakref.ref(subject.model)
        del subject, truths
        gc.collect()
        kept = model() is not None
        result.add("let go", "wrong" if kept else "right", "the model is kept alive" if kept else "")
    result.seconds = time.perf_counter() - begun
    return result


def _finite(subject: Drawn) -> Drawn:
    """The model, in single precision if it is in half and gives NaN or infinity by itself: of such a model nothing can be asked."""
    if subject.spec.dtype not in HALVES or all(bool(subject.run(b).isfinite().all()) for b in subject.batches):
        return subject
    return drawn(reconciled(dataclasses.replace(subject.spec, dtype="float32")))


def _compare(subject: Drawn, truths: list[Truth], result: Comparison) -> None:
    spec = subject.spec
    before, state = [subject.run(batch) for batch in subject.batches], _state(subject.model)
    level: Literal["core", "full"] = "full" if spec.seed % 5 == 0 else "core"
    parts: Sequence[str] = PARTS
    if _look(subject, truths, level, result):
        _compare_contributions(subject, truths, result)
    else:
        # What was refused as a whole is refused in its parts; one is tried, another one for each seed.
        parts = [PARTS[spec.seed % len(PARTS)]]
    for part in parts:
        _compare_without(subject, truths, (part,), None, result)
    if len(parts) > 1:
        _compare_without(subject, truths, ("mlp", "residual"), None, result)
        one = ("attention", "mlp", "norm", "attention-residual")[spec.seed % 4]
        _compare_without(subject, truths, (one,), (spec.seed % spec.blocks,), result)
        _look_without(subject, result)
        if spec.seed % 8 == 3 or spec.start == "zero projections":
            _compare_ablation(subject, result)
    after = [subject.run(batch) for batch in subject.batches]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    changed = (
        "the model's output" if not same else ", ".join(k for k, v in _state(subject.model).items() if v != state[k])
    )
    result.add("left as it was", "wrong" if changed else "right", f"changed: {changed}" if changed else "")
    if spec.start == "zero projections":
        subject.train()
        _look_again(subject, "after training", result)
    other = subject.otherwise_padded() if spec.seed % 4 == 0 else None
    if other is not None:
        _look_again(other, "padded otherwise", result)


def _compare_written_out(subject: Drawn, truths: list[Truth], result: Comparison) -> None:
    """Where torch fuses a module of its own, the truth is that of the run that is written out. It stands for the user's own run
    if it is the same function no more coarsely: its output must be no farther from that in float64 than four times as far as the
    fused one is, the factor of `_grown`. In 163 such models it was at most twice as far."""
    twin = copy.deepcopy(subject)
    twin.model.double()
    for batch, truth in zip(subject.batches, truths, strict=True):
        fused = subject.run(batch)
        with written_out():
            plain = subject.run(batch)
            if torch.equal(plain, fused):
                continue
            exact = twin.run({k: v.double() if v.is_floating_point() else v for k, v in batch.items()}).numpy()
        of_plain, of_fused = (_apart(t.double().numpy(), exact, truth.real) for t in (plain, fused))
        eps = torch.finfo(fused.dtype).eps  # in float64 there is nothing more exact: then it is the rounding itself
        close = of_plain <= 4 * max(of_fused, eps)
        detail = "" if close else f"written out it is {of_plain:.3g} off, fused {of_fused:.3g}"
        result.add("written out", "right" if close else "wrong", detail)


def _look(subject: Drawn, truths: list[Truth], level: Literal["core", "full"], result: Comparison) -> bool:
    """Diagnose, and compare the record; whether there was one."""
    try:
        record = uc.diagnose(subject.model, batches=[dict(batch) for batch in subject.batches], level=level).record
    except uc.UncollapseError as error:
        result.add("diagnose", "refused", str(error))
        return False
    except Exception as error:  # whatever a user would see as a traceback counts as wrong
        result.add("diagnose", "wrong", f"{type(error).__name__}: {error}")
        return False
    result.add("diagnose", "right")
    _compare_record(subject.spec, truths, record, result)
    return True


def _look_again(subject: Drawn, situation: str, result: Comparison) -> None:
    """The same model object in another situation: what was found out before may no longer be so."""
    again, truths = Comparison(result.seed, result.pieces), [subject.truth(batch) for batch in subject.batches]
    if _look(subject, truths, "core", again):
        for part in ("attention", "mlp", "mask"):
            _compare_without(subject, truths, (part,), None, again)
    result.items += [Item(f"{situation}: {item.name}", item.verdict, item.detail) for item in again.items]


def _look_without(subject: Drawn, result: Comparison) -> None:
    """A diagnosis of the model without one of its parts: every figure is that of the model that runs without it."""
    spec = subject.spec
    part = ("mlp", "attention", "residual", "mlp-residual", "norm", "mask", "mlp")[spec.seed % 7]
    verdicts = {item.name: item.verdict for item in result.items}
    if verdicts.get(f"without.{part}") != "right" or _expectation(spec, (part,)) != "defined":
        return
    if spec.attention in NO_SOFTMAX or spec.residuals == "in nn.TransformerEncoderLayer":
        return  # what else the part may mean is the business of `_alternatives`; torch's layer is written out without it
    again, batches = Comparison(result.seed, result.pieces), [dict(batch) for batch in subject.batches]
    try:
        with uc.without(subject.model, part, batch=batches[0]):
            record = uc.diagnose(subject.model, batches=batches).record
    except uc.UncollapseError as error:
        again.add("diagnose", "refused", str(error))
    except Exception as error:  # a traceback
        again.add("diagnose", "wrong", f"{type(error).__name__}: {error}")
    else:

        def compare(names: tuple[str, ...], result: Comparison) -> None:
            truths, twins = _truths_twice(subject, names)
            _compare_sites(spec, truths, record, result, twins)
            if part != "attention":
                _compare_attention(spec, truths, record, result, twins)

        again = _best(spec, (part,), again, compare)
    result.items += [Item(f"inside without.{part}: {item.name}", item.verdict, item.detail) for item in again.items]


def _best(
    spec: Specification,
    parts: tuple[str, ...],
    result: Comparison,
    compare: Callable[[tuple[str, ...], Comparison], None],
) -> Comparison:
    """The comparison with that of the things a part may mean which is least wrong; all of it with one and the same."""
    found = []
    for names in _alternatives(spec, parts):
        found.append(dataclasses.replace(result, items=list(result.items)))
        compare(names, found[-1])
    return min(found, key=lambda one: sum(item.verdict == "wrong" for item in one.items))


def _truths_twice(subject: Drawn, parts: tuple[str, ...]) -> tuple[list[Truth], list[Truth]]:
    """The truths of a model without some parts, as it is and in float64. Where the two differ, its own roundings are grown: norms
    keep logits small, and without them a softmax may stand on the last digits of numbers in the thousands."""
    twin = copy.deepcopy(subject)
    twin.model.double()
    batches = [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in subject.batches]
    return [subject.truth(b, *parts) for b in subject.batches], [twin.truth(b, *parts) for b in batches]


def _compare_ablation(subject: Drawn, result: Comparison) -> None:
    """`ablate` without one part: whether it takes the model for causal, and every run's clouds."""
    spec, batches = subject.spec, [dict(batch) for batch in subject.batches]
    part = ("norm", "residual", "mlp")[spec.seed % 3]
    try:
        record = uc.ablate(subject.model, without=[(part,)], batches=batches).record
    except uc.UncollapseError as error:
        verdict = "right" if _expectation(spec, (part,)) == "absent" else "refused"
        result.add(f"ablate.{part}", verdict, str(error))
        return
    except Exception as error:  # a traceback
        result.add(f"ablate.{part}", "wrong", f"{type(error).__name__}: {error}")
        return
    if spec.attention not in NO_SOFTMAX and spec.masking != "after the softmax":
        is_causal = spec.mask.startswith("causal") and min(tokens for _, tokens in spec.batches) > 1
        _number(result, "ablate.is_causal", record.is_causal, is_causal)
    if _expectation(spec, (part,)) == "absent":
        said = [v.prediction for v in record.verdicts if part in v.without]
        result.add(f"ablate.{part}", "wrong" if said else "right", "a verdict on what is not there" if said else "")
        return
    again = Comparison(result.seed, result.pieces)
    for run in record.runs:
        if run.without and spec.attention in NO_SOFTMAX:
            continue

        def compare(names: tuple[str, ...], result: Comparison, run: Any = run) -> None:
            truths, twins = _truths_twice(subject, names)
            _compare_sites(spec, truths, run, result, twins)

        again = _best(spec, tuple(run.without), again, compare)
        if run.without:
            again.items.append(_output_shift(subject, run))
    result.items += [Item(f"ablate.{part}: {item.name}", item.verdict, item.detail) for item in again.items]


def _output_shift(subject: Drawn, run: Any) -> Item:
    """How far a sequence's mean output vector over its real tokens has turned: the least wrong of what the part may mean."""
    items = []
    for names in _alternatives(subject.spec, tuple(run.without)):
        shifts, others = list[float](), list[float]()
        for found, dtype in ((shifts, None), (others, torch.float64)):
            twin = copy.deepcopy(subject)
            if dtype is not None:
                twin.model.double()
            for batch in subject.batches:
                given = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in batch.items()}
                real = twin.truth(given).real
                whole, left = (t.double().numpy() for t in (twin.run(given), twin.without(given, *names)))
                for a, b, rows in zip(whole, left, real, strict=True):
                    a, b = a[rows].mean(0), b[rows].mean(0)
                    found.append(1 - float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))))
        want, near = summary(shifts), max(tolerance(subject.spec).figure, 1e-5)
        items.append(
            _figure("output_shift", run.output_shift, run.unavailable, want, near + _grown(want, summary(others)))
        )
    return min(items, key=lambda item: item.verdict == "wrong")


def _state(model: torch.nn.Module) -> dict[str, Any]:
    """What a user would be annoyed to find changed."""
    modules = dict(model.named_modules())
    return {
        "parameters": {n: float(p.detach().double().sum()) for n, p in model.named_parameters()},
        "modules": {n: (id(m), m.training) for n, m in modules.items()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in modules.items()},
        "attributes": {n: sorted(vars(m)) for n, m in modules.items()},
    }


def _figure(
    name: str,
    got: Any,
    unavailable: Mapping[str, str],
    want: tuple[float, float, float, int] | None,
    near: float,
    size: float = 0.0,
) -> Item:
    """One statistic against the truth. `name` ends in the figure's own name. `size`: of the largest number that a logit was
    rounded beside."""
    figure = name.rsplit(".", 1)[-1]
    if got is None:
        reason = unavailable.get(figure, "")
        if want is None:
            return Item(name, "right" if reason else "wrong", reason or "null without a reason")
        return Item(name, "unavailable" if reason else "wrong", reason or "null without a reason")
    seen = (got.mean, got.min, got.max, got.n)
    if want is None:
        return Item(name, "wrong", f"got {got.mean:.6g} where there is no such figure")
    if figure == "entropy_floor":  # a bound: not above the entropy, and not below none
        holds = all(-near <= g <= w + near * max(1.0, abs(w)) for g, w in zip(seen[:3], want[:3], strict=True))
        return Item(
            name, "right" if holds else "wrong", "" if holds else f"floor {got.mean:.6g} of entropy {want[0]:.6g}"
        )
    # A logit is a sum of products, some of them large: it is rounded as the largest one is.
    sizes = [max(size, *map(abs, want[:3]))] * 3 if figure == "max_logit" else [abs(w) for w in want[:3]]
    close = all(abs(g - w) <= near * max(1.0, s) for g, w, s in zip(seen[:3], want[:3], sizes, strict=True))
    if close and got.n == want[3]:
        return Item(name, "right")
    return Item(name, "wrong", f"got {got.mean:.6g} (n={got.n}), true {want[0]:.6g} (n={want[3]})")


def _number(result: Comparison, name: str, got: Any, want: Any) -> None:
    result.add(name, "right" if got == want else "wrong", "" if got == want else f"got {got}, true {want}")


def _compare_record(spec: Specification, truths: list[Truth], record: Any, result: Comparison) -> None:
    counts = {
        "sequences": sum(len(t.real) for t in truths),
        "tokens": sum(int(t.real.sum()) for t in truths),
        "max_tokens": max(t.real.shape[1] for t in truths),
    }
    for name, count in counts.items():
        got = getattr(record.probe, name)
        if got is None:
            reason = record.probe.unavailable.get(name, "")
            result.add(f"probe.{name}", "unavailable" if reason else "wrong", reason or "null without a reason")
        else:
            _number(result, f"probe.{name}", got, count)
    _number(result, "model.blocks", record.model.blocks, spec.blocks)
    _number(result, "model.width", record.model.width, spec.width)
    placement = "none" if spec.norm == "none" else "pre" if spec.is_parallel else spec.placement
    _number(
        result,
        "model.norm_placement",
        record.model.norm_placement,
        placement + (", parallel" if spec.is_parallel else ""),
    )
    if spec.attention not in NO_SOFTMAX:
        both = spec.attention in DIFFERENCES and record.model.heads == 2 * spec.heads  # the two softmaxes apart
        _number(result, "model.heads", record.model.heads, record.model.heads if both else spec.heads)
    _compare_sites(spec, truths, record, result)
    _compare_attention(spec, truths, record, result)
    _compare_heads(spec, truths, record, result)
    if spec.attention == "channels":
        about = [f.code for f in record.findings if f.phenomenon in {"entropy-collapse", "rank-collapse-width"}]
        result.add(
            "findings",
            "wrong" if about else "right",
            f"{', '.join(about)} of an attention over channels" if about else "",
        )


def _compare_heads(spec: Specification, truths: list[Truth], record: Any, result: Comparison) -> None:
    """What the output projection says of its heads, and how much each writes."""
    near = tolerance(spec).figure
    for block in range(spec.blocks):
        ones = [t.attention[block] for t in truths]
        entries, name = [h for h in record.heads if h.block == block], f"heads.{block}"
        if ones[0].kind != "softmax" or len(entries) != 1:
            continue  # whether there is an entry at all is the business of `attention`
        (entry,) = entries
        if entry.output_projection_rank is None:
            reason = entry.unavailable.get("output_projection_rank", "")
            result.add(
                f"{name}.output_projection_rank",
                "unavailable" if reason else "wrong",
                reason or "null without a reason",
            )
        else:
            assert ones[0].matrix is not None
            rank = int(np.linalg.matrix_rank(ones[0].matrix, tol=None if spec.dtype == "float64" else 1e-4))
            # Between what rounding makes of a zero (adapters are products) and the tolerance, a singular value may count or not.
            sigma = np.linalg.svd(ones[0].matrix, compute_uv=False)
            rounded_off = np.linalg.norm(sigma) * sum(n**-0.5 for n in ones[0].matrix.shape) * np.finfo(np.float32).eps
            surely_not_zero = int((sigma > rounded_off).sum())
            if spec.dtype != "float64" and rank < entry.output_projection_rank <= surely_not_zero:
                rank = entry.output_projection_rank
            if tolerance(spec).output > 1e-3 and 0.8 * rank <= entry.output_projection_rank <= rank:
                rank = entry.output_projection_rank  # what 8 bits a number cannot tell from 0 is not counted
            _number(result, f"{name}.output_projection_rank", entry.output_projection_rank, rank)
            sizes = (entry.heads, entry.head_width, entry.width)
            _number(result, f"{name}.sizes", sizes, (spec.heads, len(ones[0].matrix) // spec.heads, spec.width))
        shares = np.array(
            [head_energies(one, t.real, i) for one, t in zip(ones, truths, strict=True) for i in range(len(t.real))]
        )
        for head in range(spec.heads):
            got = (
                None
                if entry.energy_share is None
                else entry.energy_share[head]
                if head < len(entry.energy_share)
                else None
            )
            want = summary(list(shares[:, head]))
            result.items.append(_figure(f"{name}.{head}.energy_share", got, entry.unavailable, want, near))


def _compare_sites(
    spec: Specification, truths: list[Truth], record: Any, result: Comparison, twins: list[Truth] | None = None
) -> None:
    """`twins` are the truths in float64, of another pass than the package's: with a part left out."""
    near = 1e-5 if spec.dtype != "float64" else 1e-9  # all are computed in float64 from the very stream
    if spec.wrapper == "autocast":
        near = tolerance(spec).figure
    if twins is not None:  # in float64 throughout where the model has single precision islands
        near = max(tolerance(spec).figure, 1e-5)
    if spec.residuals == "in the model's loop" and all(t.begun is not None for t in truths):
        begun = [dataclasses.replace(t, streams=[t.begun, *t.streams[1:]]) for t in truths]  # type: ignore[list-item]
        found = [Comparison(result.seed, result.pieces) for _ in range(2)]
        for one, of in zip(found, (truths, begun), strict=True):
            _compare_streams(spec, of, record, one, twins, near)
        result.items += min(found, key=lambda one: sum(item.verdict == "wrong" for item in one.items)).items
    else:
        _compare_streams(spec, truths, record, result, twins, near)


def _compare_streams(
    spec: Specification, truths: list[Truth], record: Any, result: Comparison, twins: list[Truth] | None, near: float
) -> None:
    sites = {site.site: site for site in record.trajectory}
    for number in range(spec.blocks + 1):
        name = "embedding" if number == 0 else f"block.{number - 1}"
        site = sites.get(name)
        references, others = (
            [site_reference(t.streams[number][i][t.real[i]]) for t in of for i in range(len(t.real))]
            for of in (truths, twins or [])
        )
        for figure in SITE_FIGURES:
            if site is None:
                result.add(f"{name}.{figure}", "wrong", f"no such site among {', '.join(sites)}")
                continue
            want = summary([r[figure] for r in references])
            # A float32 mean over the tokens is what the cheaper measures use.
            loose = near if figure in {"effective_rank", "stable_rank"} else max(near, 1e-4 * (spec.dtype != "float64"))
            loose += _grown(want, summary([r[figure] for r in others]))
            result.items.append(_figure(f"{name}.{figure}", getattr(site, figure), site.unavailable, want, loose))


def _grown(want: tuple[float, float, float, int] | None, other: tuple[float, float, float, int] | None) -> float:
    """How far the model's own roundings, grown, have brought a statistic: what another order of operations may do as well."""
    if want is None or other is None:
        return 0.0
    return 4 * max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(want[:3], other[:3], strict=True))


def _by_head(record: Any, block: int) -> list[Any]:
    return sorted((a for a in record.attention if a.block == block), key=lambda a: a.head)


def _is_silent(entries: list[Any]) -> bool:
    return all(getattr(a, f) is None for a in entries for f in ATTENTION_FIGURES if f != "value_contraction")


def _compare_attention(
    spec: Specification, truths: list[Truth], record: Any, result: Comparison, twins: list[Truth] | None = None
) -> None:
    near = tolerance(spec).figure
    for block in range(spec.blocks):
        entries, ones = _by_head(record, block), [t.attention[block] for t in truths]
        kind, name = ones[0].kind, f"attention.{block}"
        if kind == "channels":
            silent = _is_silent(entries)
            result.add(
                name, "right" if silent else "wrong", "" if silent else "channels measured as if they were tokens"
            )
            continue
        if not entries:
            _no_entries(kind, name, record, result)
            continue
        if kind == "difference" and len(entries) == 2 * spec.heads:
            _compare_parts(name, entries, truths, block, near, result)
            continue
        if len(entries) != spec.heads:
            silent = _is_silent(entries) and all(a.unavailable.get("entropy") for a in entries)
            detail = f"{len(entries)} heads, true {spec.heads}"
            result.add(name, "unavailable" if silent else "wrong", detail)
            continue
        for head, entry in enumerate(entries):
            every, others = (
                [head_reference(t.attention[block], t.real, i, head, spec) for t in of for i in range(len(t.real))]
                for of in (truths, twins or [])
            )
            full = record.probe.level == "full"
            for figure in (*ATTENTION_FIGURES, *(FULL_FIGURES if full else ())):
                if any(math.isinf(r[figure]) for r in every):
                    continue
                want = summary([r[figure] for r in every])
                loose = (
                    near
                    + _grown(want, summary([r[figure] for r in others]))
                    + _rounded_when_written_out(spec, ones, head)
                )
                if figure == "entropy_floor":
                    want = summary([r["entropy"] for r in every]) if kind == "softmax" else None
                got = getattr(entry, figure)
                if got is None and (kind != "softmax" or (figure in OF_LOGITS and spec.masking.startswith("after"))):
                    want = None  # nothing needs to be said of what is no softmax, nor of logits that A does not follow from
                of = f"{name}.{head}.{figure}"
                result.items.append(_figure(of, got, entry.unavailable, want, loose, _largest_logit(ones, head)))


def _largest_logit(ones: Sequence[AttentionTruth], head: int) -> float:
    """The size of the largest logit of a head among its allowed pairs: all logits come from queries and keys of one size, and are
    rounded as the largest one is, also where a row's maximum is near 0. 0 where there are none."""
    sizes = [0.0]
    for one in ones:
        if one.logits is not None and one.allowed is not None:
            seen = np.where(one.allowed[:, 0], one.logits[:, head], 0.0)
            sizes.append(float(np.abs(seen[np.isfinite(seen)]).max(initial=0.0)))
    return max(sizes)


def _rounded_when_written_out(spec: Specification, ones: Sequence[AttentionTruth], head: int) -> float:
    """How far, in nats, two logits may have come apart that a half-precision product rounded: torch's own attention, written out
    for its truth, makes them as numbers, and the call that it runs as does not."""
    is_own = spec.attention == "nn.MultiheadAttention" or spec.residuals == "in nn.TransformerEncoderLayer"
    if not is_own or (spec.wrapper != "autocast" and spec.dtype not in HALVES):
        return 0.0
    eps = torch.finfo(torch.float16 if spec.dtype == "float16" else torch.bfloat16).eps
    return eps * _largest_logit(ones, head)


def _no_entries(kind: str, name: str, record: Any, result: Comparison) -> None:
    """A block without any entry: right for what is no softmax, unavailable where the record says so, else wrong."""
    if kind in {"sigmoid", "linear"}:
        result.add(name, "right", "not taken for an attention")
    elif getattr(record, "anatomy", None):
        result.add(name, "unavailable", "no entry; see the record's anatomy")
    else:
        result.add(name, "wrong", "no entry, and no reason")


def _compare_parts(
    name: str, entries: list[Any], truths: list[Truth], block: int, near: float, result: Comparison
) -> None:
    """A difference of two softmaxes whose record keeps the two apart: each entry is one head of one of them."""
    wanted = []
    for part in (0, 1):
        for head in range(len(entries) // 2):
            values = []
            for t in truths:
                one = t.attention[block]
                assert one.parts is not None
                alone = AttentionTruth("softmax", one.parts[part], None, one.allowed, one.values, one.mixed)
                values += [head_reference(alone, t.real, i, head)["entropy"] for i in range(len(t.real))]
            wanted.append(float(np.mean(values)))
    for entry in entries:
        got = entry.entropy
        if got is None:
            result.items.append(_figure(f"{name}.{entry.head}.entropy", None, entry.unavailable, None, near))
            continue
        closest = min(wanted, key=lambda w: abs(w - got.mean))
        found = abs(closest - got.mean) <= near
        result.add(
            f"{name}.{entry.head}.entropy",
            "right" if found else "wrong",
            "" if found else f"got {got.mean:.6g}, closest of either softmax {closest:.6g}",
        )


def _compare_contributions(subject: Drawn, truths: list[Truth], result: Comparison) -> None:
    spec = subject.spec
    for number, (batch, truth) in enumerate(zip(subject.batches, truths, strict=True)):
        name = "head_contributions" if number == 0 else f"head_contributions, batch {number}"
        try:
            found = {f.block: f for f in uc.head_contributions(subject.model, dict(batch))}
        except uc.UncollapseError as error:
            meant = spec.attention in NO_SOFTMAX
            result.add(name, "right" if meant else "refused", str(error))
            continue
        except Exception as error:  # a traceback
            result.add(name, "wrong", f"{type(error).__name__}: {error}")
            continue
        for block in range(spec.blocks):
            one, here = truth.attention[block], found.get(block)
            if one.kind == "channels" or here is None:
                ok = one.kind in {"channels", "linear", "sigmoid"} and here is None
                result.add(
                    f"{name}.{block}", "right" if ok else "wrong", "" if ok else "channels as heads, or no entry"
                )
                continue
            result.add(f"{name}.{block}", *_contributions(spec, one, truth.real, here))


def _contributions(spec: Specification, one: AttentionTruth, real: np.ndarray, found: Any) -> tuple[str, str]:
    got, want = found.contributions.double().numpy(), one.contributions
    if one.kind == "difference" and got.shape[2] == 2 * want.shape[2]:  # the two softmaxes apart, as their entries are
        assert one.parts is not None
        assert one.matrix is not None
        if spec.gate == "none":
            first = np.einsum(
                "bhqk,bhkd,hdo->bqho",
                one.parts[0],
                one.found()[2],
                one.matrix.reshape(want.shape[2], -1, want.shape[3]),
            )
            want = np.concatenate([first, want - first], 2)
        else:
            got = got[:, :, : want.shape[2]] + got[:, :, want.shape[2] :]
    if got.shape != want.shape:
        return "wrong", f"shape {got.shape}, true {want.shape}"
    if not np.array_equal(found.mask.numpy(), real):
        return "wrong", "other real tokens"
    # A constant may sit in the bias or, through a value bias, in the heads: only their sum is determined by W_O alone here.
    scale = max(float(np.sqrt((want[real] ** 2).mean())), 1e-12)
    gap = float(np.sqrt(((got - want)[real] ** 2).mean())) / scale
    assert one.bias is not None
    # NaN where the truth is (logits whose exponential overflows): then it is the size itself that is compared.
    size = max(float(np.abs(one.bias).max()), scale if math.isfinite(scale) else 0.0, 1e-12)
    biased = float(np.abs(found.bias.double().numpy() - one.bias).max()) / size
    near = tolerance(spec).output
    if not want[real].any():
        gap = float(np.abs(got[real]).max())
    if gap <= near and biased <= near:
        return "right", ""
    return "wrong", f"off by {gap:.3g} of their size, the bias by {biased:.3g}"


# Removals --------------------------------------------------------------------------------------------------------------


def _expectation(spec: Specification, parts: tuple[str, ...]) -> str:
    """`defined`; `undefined` (has no meaning: must be refused); `absent` (nothing of the kind: must be refused); `optional` (may
    be refused, by the documentation)."""
    part = parts[0]
    if spec.is_parallel and part in {"attention-residual", "mlp-residual"}:
        return "undefined"
    if part == "norm" and spec.norm == "none":
        return "absent"
    if part == "positions" and (spec.positions == "none"):
        return "absent"
    if part == "mask" and not spec.has_mask:
        return "absent"
    told = (
        spec.signature.endswith("position_ids") and spec.given == "ids" and spec.positions != "rotary, in the attention"
    )
    of_no_softmax = spec.attention in NO_SOFTMAX and part in {"mask", "attention", "attention-residual"}
    if (part == "positions" and not told) or of_no_softmax:
        return "optional"
    return "defined"


def _alternatives(spec: Specification, parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """What may also be meant: a mixer that is no softmax goes with the MLP, where it is not called attention; and a factor right
    behind a norm may be its gain or a scale of the sum."""
    yield parts
    if parts == ("norm",) and spec.placement in {"sandwich", "output"} and spec.update_scale != "none":
        yield "norm", "update-scale"
    if spec.attention in NO_SOFTMAX:
        if parts == ("mlp",):
            yield ("mlp", "attention")
        if parts == ("mlp-residual",):
            yield ("residual",)
        if parts == ("mlp", "residual"):
            yield ("mlp", "attention", "residual")


def _compare_without(
    subject: Drawn, truths: list[Truth], parts: tuple[str, ...], blocks: tuple[int, ...] | None, result: Comparison
) -> None:
    spec, batches = subject.spec, subject.batches
    name = f"without.{'+'.join(parts)}" + ("" if blocks is None else f".in block {blocks[0]}")
    expected = _expectation(spec, parts)
    plains = [subject.run(batch).double().numpy() for batch in batches]
    wanted = [
        [subject.without(batch, *names, blocks=blocks).double().numpy() for batch in batches]
        for names in _alternatives(spec, parts)
    ]
    try:
        with uc.without(subject.model, *parts, blocks=blocks, batch=dict(batches[0])):
            found = [subject.run(batch).double().numpy() for batch in batches]
    except uc.UncollapseError as error:
        # What changes no bit (a projection that starts at zero) is refused, or gives the same output: both are right. So it is
        # where this is said of the batch that was given, which may be too short for a window to forbid anything.
        given = 1 if "the same in every bit" in str(error) else len(plains)
        seen = list(zip(wanted[0], plains, truths, strict=False))[:given]
        changes = any((w != p)[t.real].any() for w, p, t in seen)
        result.add(name, "refused" if expected == "defined" and changes else "right", str(error))
        return
    except Exception as error:  # a traceback
        result.add(name, "wrong", f"{type(error).__name__}: {error}")
        return
    if expected == "undefined":
        result.add(name, "wrong", "not refused, though the two sublayers share their residual")
        return

    def apart(ones: list[np.ndarray], others: list[np.ndarray]) -> float:
        return max(_apart(a, b, t.real) for a, b, t in zip(ones, others, truths, strict=False))

    if expected == "absent":
        result.add(
            name, "wrong", f"there is none, and nothing was said; the output moved by {apart(found, plains):.3g}"
        )
        return
    allowed = tolerance(spec).output
    gap, effect, meant = min((apart(found, want), apart(plains, want), i) for i, want in enumerate(wanted))
    names, want = list(_alternatives(spec, parts))[meant], wanted[meant]
    if not any(np.isfinite(w[t.real]).any() for w, t in zip(want, truths, strict=True)):
        result.add(name, "indistinct" if gap == 0 else "wrong", "nothing finite is left of the model without it")
    elif not gap <= allowed and not gap <= allowed + _grown_output(subject, names, blocks, want, truths):
        said = "nothing was removed" if apart(found, plains) == 0 else f"off by {gap:.3g}"
        result.add(name, "wrong", f"{said}, where the removal moves the output by {effect:.3g}")
    elif 0 < effect <= 3 * allowed:
        result.add(name, "indistinct", f"the removal moves the output by {effect:.3g} only")
    else:
        result.add(name, "right")


def _grown_output(
    subject: Drawn,
    parts: tuple[str, ...],
    blocks: tuple[int, ...] | None,
    want: Sequence[np.ndarray],
    truths: Sequence[Truth],
) -> float:
    """How far the model's own roundings, grown, have brought the output of the model without these parts: four times its
    distance from the same in float64, as `_grown` has it for figures."""
    twin = copy.deepcopy(subject)
    twin.model.double()
    batches = [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in subject.batches]
    exact = [twin.without(batch, *parts, blocks=blocks).numpy() for batch in batches]
    apart = []
    for a, b, t in zip(want, exact, truths, strict=True):
        both = np.isfinite(a) & np.isfinite(b)  # float64 overflows later: that says nothing of roundings
        apart.append(_apart(np.where(both, a, np.nan), np.where(both, b, np.nan), t.real))
    return 4 * max(apart)


def _apart(a: np.ndarray, b: np.ndarray, real: np.ndarray) -> float:
    """The root mean square difference of two outputs over real tokens, relative to the second. What overflows in both is equal;
    what does so in one of them alone is infinitely far."""
    if a.shape != b.shape:
        return math.inf
    a, b = a[real], b[real]
    finite = np.isfinite(b)
    if not np.array_equal(np.isfinite(a), finite):
        return math.inf
    if not finite.any():
        return 0.0
    return float(np.sqrt(((a - b)[finite] ** 2).mean()) / max(np.sqrt((b[finite] ** 2).mean()), 1e-12))
