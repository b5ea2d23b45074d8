"""How the attention patterns of a model change as the context grows. Collapse in width is a limit for long contexts.

The same stream of real tokens is cut into windows of each length, with one probe pass per length. Then the second singular
value of every attention matrix is fitted as a power of the length. A power near -1/2 is a collapse in width: with independent
logits every row becomes the same mixture as the context grows (Nait Saada, Naderi, Tanner 2025, arXiv 2410.07799).

When not to use it: for inputs whose length cannot be chosen (images), or for lengths that the model was not made for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from uncollapse.anatomy.stacks import given_mask
from uncollapse.anatomy.vocabulary import Anatomy
from uncollapse.errors import InputError, UncollapseError
from uncollapse.measures.line_fit import LineFit, line_fit
from uncollapse.probe.attention import ATTENTION_MEASURES, AttentionStatistics
from uncollapse.probe.passes import Progress, capture
from uncollapse.records.common import Statistic
from uncollapse.records.symmetries import WidthScaling

WINDOWS = 4  # of each length; all heads of a call are averaged as well
SHORTEST = 8  # below, a second singular value is mostly the first tokens' business
# The exponent with independent logits is -1/2 in the limit; at hundreds of tokens and logits of variance 1 it was -0.41. Half of
# the law's exponent divides it from no law at all.
INDEPENDENT = -0.25
ROUNDING = 1e-6  # a second singular value below is what single precision leaves of zero

_USUAL = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


def require_context_lengths(lengths: Sequence[int]) -> list[int]:
    """The lengths in rising order, each once. Raises `InputError` below two different ones, or for one that is too short."""
    ordered = sorted(set(lengths))
    if len(ordered) < 2 or ordered[0] < SHORTEST:
        raise InputError(
            f"context lengths: expected two or more different lengths of at least {SHORTEST} tokens, got {list(lengths)}. "
            "A slope needs two points, an interval three. Pass for example 32,64,128."
        )
    return ordered


def width_scaling(
    model: torch.nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Mapping[str, Any]],
    lengths: Sequence[int],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[WidthScaling]:
    """One record for each attention call, from windows of the `batches`' real tokens laid end to end.

    lengths: in rising order, see `require_context_lengths`.
    Raises `InputError` if there are too few tokens for the longest, or the model takes no token numbers or not that many.
    """
    streams = _token_streams(batches, anatomy)
    calls: list[AttentionStatistics] = []
    columns: list[list[Statistic | None]] = []
    for number, length in enumerate(lengths):
        if progress is not None:
            progress("context lengths", number, len(lengths))
        windows = {name: _windows(stream, length) for name, stream in streams.items()}
        try:
            observed = capture(model, [windows], anatomy, seed=seed, watch={"attention", "spectra"})
        except UncollapseError:
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            raise InputError(
                f"context lengths: expected lengths that the model can take, got {length} ({type(error).__name__}: {error}). "
                "It was probably made for fewer positions. Leave that length out."
            ) from error
        calls = observed.attention
        columns.append([_over_heads(s) for s in calls])
    if progress is not None:
        progress("context lengths", len(lengths), len(lengths))
    return [_record(anatomy, s, lengths, [column[i] for column in columns]) for i, s in enumerate(calls)]


def _token_streams(batches: Sequence[Mapping[str, Any]], anatomy: Anatomy) -> dict[str, Tensor]:
    """The real tokens of all sequences, laid end to end, for each input that is known to hold a stack's token numbers."""
    streams = {}
    for stack in anatomy.stacks:
        if stack.ids is None or stack.ids_transposed or not all(stack.ids in batch for batch in batches):
            continue
        found = []
        for batch in batches:
            numbers, real = batch[stack.ids], given_mask(stack, batch)
            found.append(numbers.flatten() if real is None else numbers[real[:, -numbers.shape[1] :]])
        streams[stack.ids] = torch.cat(found)
    told = {stack.ids for stack in anatomy.stacks}
    for name, mask in _USUAL.items():  # numbers of which no stack is known to be made are taken at their word
        if name not in told and all(name in batch for batch in batches):
            found = [b[name][b[mask].bool()] if mask in b else b[name].flatten() for b in batches]
            streams[name] = torch.cat(found)
    if not streams:
        raise InputError(
            f"context lengths: expected batches with token numbers [sequence, token], such as input_ids, got "
            f"{', '.join(batches[0])}. The length of other inputs cannot be chosen. Leave the context lengths out."
        )
    return streams


def _windows(stream: Tensor, length: int) -> Tensor:
    count = min(WINDOWS, len(stream) // length)
    if not count:
        raise InputError(
            f"context lengths: expected at least {length} tokens of text, got {len(stream)}. "
            "The windows are cut from the text of the probe. Give more text or shorter lengths."
        )
    starts = torch.arange(count) * (len(stream) // count)
    return stream[starts[:, None] + torch.arange(length)]


def _over_heads(statistics: AttentionStatistics) -> Statistic | None:
    """The second singular value of one call: of each head the mean over windows; mean, smallest and largest head."""
    row = ATTENTION_MEASURES.index("second_singular_value")
    heads = [statistics.values.summary(row, h) for h in range(statistics.call.heads)]
    means = [mean for mean, _, _, n in heads if n]
    return Statistic.of(sum(means) / len(means), min(means), max(means), len(means)) if means else None


def _record(
    anatomy: Anatomy, statistics: AttentionStatistics, lengths: Sequence[int], values: Sequence[Statistic | None]
) -> WidthScaling:
    measured = [(n, v.mean) for n, v in zip(lengths, values, strict=True) if v is not None]
    points = [(math.log(n), math.log(v)) for n, v in measured if v > ROUNDING]
    fit = line_fit([x for x, _ in points], [y for _, y in points])
    parts = anatomy.blocks[statistics.block].parts
    causal = any(p.is_causal for p in parts if statistics.call in p.attention)
    return WidthScaling(
        block=statistics.block,
        stack=statistics.stack,
        kind=statistics.kind,
        context_lengths=list(lengths),
        second_singular_value=list(values),
        slope=fit.slope,
        slope_low=fit.low,
        slope_high=fit.high,
        regime="zero: every token gets the same mixture at any length"
        if measured and not points
        else regime(fit, causal),
    )


def regime(fit: LineFit, causal: bool) -> str:
    """Which law of sigma_2 over n a fitted slope suggests, in words.

    >>> regime(LineFit(-0.52, -0.6, -0.44), causal=False)
    'falls like independent logits: attention tends to one mixture for all tokens as the context grows'
    """
    if fit.slope is None:
        return "no slope: the second singular value could not be measured at two lengths"
    low, high = (fit.slope, fit.slope) if fit.low is None or fit.high is None else (fit.low, fit.high)
    unsure = "" if fit.low is not None else ", from two lengths only: no interval"
    if low > 0:
        return (
            "rises: a causal mask alone opens no spectral gap" if causal else "rises: longer contexts add directions"
        ) + unsure
    if high < 0 and fit.slope <= INDEPENDENT:
        return (
            "falls like independent logits: attention tends to one mixture for all tokens as the context grows" + unsure
        )
    if high < 0:
        return "falls slower than independent logits" + unsure
    return "no trend: the patterns keep a second direction at every length" + unsure
