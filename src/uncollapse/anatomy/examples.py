"""The few tokens of a batch that a model is proved on: real ones, on axes that all have another length."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from uncollapse.anatomy.module_states import left_as_found
from uncollapse.anatomy.probing import output_of, probing

EXAMPLE_TOKENS = 8


SEQUENCES, TOKENS, DECODER_TOKENS = 3, 7, 5  # of the proof: pairwise different, so that no axis passes for another


def piece_of(model: nn.Module, batch: Mapping[str, Any], real: Tensor | None = None) -> dict[str, Any]:
    """A small piece of a batch such as an anatomy is proved on. real: see `fitting_piece`."""
    return fitting_piece(model, batch, real).batch


class Piece(NamedTuple):
    """A piece of a batch. `steers`: running it makes another model of the model. `output`: what the model gives on it, where it was
    seen; see `output_on`."""

    batch: dict[str, Any]
    steers: bool
    output: list[Tensor] | None


def fitting_piece(model: nn.Module, batch: Mapping[str, Any], real: Tensor | None = None) -> Piece:
    """The first of several pieces that the model runs on: `example_batch`, one cut along its first axis alone, the whole batch
    (patches laid end to end, fixed lengths); also the whole batch for a model that would not be the same model afterwards
    (BigBird gives up its sparse attention on a short text). Then also whether the whole batch makes another model of it, too.
    real: which tokens are real [sequence, token], where that is not what `attention_mask` says."""
    for piece in (example_batch(batch, real=real), _first_sequences(batch)):
        output = output_on(model, piece)
        if output is not None:
            return Piece(piece, False, output)
    return Piece(dict(batch), sends_elsewhere(model, batch), None)


def as_long_a_piece(model: nn.Module, batch: Mapping[str, Any], real: Tensor | None = None) -> dict[str, Any] | None:
    """A few sequences of a batch with as many tokens as it has, for a model whose way depends on that; None where it does not run
    on them. real: see `fitting_piece`."""
    longest = max((max(t.shape[:2]) for t in batch.values() if isinstance(t, Tensor) and t.ndim > 1), default=TOKENS)
    piece = example_batch(batch, longest, real=real)
    return piece if runs_on(model, piece) else None


def one_sequence(
    model: nn.Module,
    batch: Mapping[str, Any],
    real: Tensor | None = None,
    per_token: Collection[str] = (),
    ran: Callable[[Mapping[str, Any]], bool] | None = None,
) -> dict[str, Any]:
    """`example`, or the whole batch where the model does not run on that, or where a square tensor of as many rows as there are
    sequences may be one over pairs of tokens: a row of such a mask can be broadcast, and mean something else. real: see
    `fitting_piece`. per_token: the names of tensors that have a value for each token. ran: whether the model has run on a piece
    before."""
    reference = _token_numbers(batch)
    square = [name for name, v in batch.items() if isinstance(v, Tensor) and v.ndim == 2 and v.shape[0] == v.shape[1]]
    if reference is not None and any(
        name not in per_token and batch[name] is not reference and batch[name].shape == reference.shape
        for name in square
    ):
        return dict(batch)
    piece = example(batch, real=real)
    return piece if (ran is not None and ran(piece)) or runs_on(model, piece) else dict(batch)


def turned(batch: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A batch whose tensors of these names have their first two axes in the other order."""
    return {name: value.transpose(0, 1) if name in names else value for name, value in batch.items()}


def runs_on(model: nn.Module, piece: Mapping[str, Any]) -> bool:
    """Whether the model runs on a piece, and is the same model afterwards."""
    return output_on(model, piece) is not None


def output_on(model: nn.Module, piece: Mapping[str, Any]) -> list[Tensor] | None:
    """What the model gives on a piece, as `output_of` has it; None where it does not run on it, or is another model afterwards."""
    try:
        with probing(model), left_as_found(model) as states:
            output = output_of(model, piece)
            return None if states.steered() else output
    except Exception:  # whatever it is, the piece does not fit; the next one is closer to the user's own batch
        return None


def sends_elsewhere(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether running `batch` sends later runs of the model another way."""
    try:
        with probing(model), left_as_found(model) as states:
            model(**batch)
            return states.steered()
    except Exception:  # `prove` says what is wrong with the batch
        return False


def example(batch: Mapping[str, Any], tokens: int = EXAMPLE_TOKENS, real: Tensor | None = None) -> dict[str, Any]:
    """One sequence of a batch, cut to at most `tokens` real tokens where it is made of token numbers. real: see `fitting_piece`."""
    reference = _token_numbers(batch)
    first = (
        next((t for t in batch.values() if isinstance(t, Tensor) and t.ndim), None) if reference is None else reference
    )
    size = 1 if first is None else first.shape[0]
    keep: dict[str, Tensor] = {}
    row = 0
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            marked = _marked_real(mask)
            row = int(marked.sum(-1).argmax()) if name == "attention_mask" else row
            keep[name.removesuffix("attention_mask")] = marked[row].nonzero().flatten()[:tokens]
    if real is not None and (reference is None or real.shape == reference.shape):
        row = int(real.sum(-1).argmax())
        keep[""] = real[row].nonzero().flatten()[:tokens]
    cut: dict[str, Any] = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != size:
            cut[name] = value
            if reference is not None and isinstance(value, Tensor) and value.shape == (reference.shape[1],) * 2:
                columns = keep.get("", torch.arange(min(tokens, len(value))))  # over pairs of tokens
                cut[name] = value[columns][:, columns].clone()
            continue
        one = value[row : row + 1]
        stack = "decoder_" if name.startswith("decoder_") else ""
        is_per_token = reference is not None and value.shape == reference.shape  # a mask may be floating
        if value.ndim == 2 and (is_per_token or not value.is_floating_point()):
            columns = keep.get(stack, torch.arange(min(tokens, value.shape[1]), device=value.device))
            if len(columns) and int(columns.max()) < value.shape[1]:
                one = one[:, columns]
        cut[name] = one.clone()
    return cut


def example_batch(batch: Mapping[str, Any], most: int = TOKENS, real: Tensor | None = None) -> dict[str, Any]:
    """Up to 3 sequences of a batch with 7 tokens each (`most`), so that no two axes have one length and none passes for another.

    What is made of token numbers is cut to real tokens; a single sequence is repeated with its tokens in another order. Other
    tensors are cut along the axes that have the lengths of the token numbers. The decoder's are cut to 5 tokens. real: see
    `fitting_piece`.
    """
    reference = _token_numbers(batch)
    if reference is None:
        return _first_sequences(batch)
    numbers = _numbers(batch)
    shape = tuple(reference.shape)
    tokens = most if shape[1] > SEQUENCES else shape[1]
    cut = {shape[1]: min(shape[1], tokens)}
    rows = [int(row) for row in _real(numbers, "", shape, real).sum(-1).argsort(descending=True, stable=True)]
    wanted = min(shape[0], SEQUENCES if shape[1] > SEQUENCES else TOKENS)
    if wanted == tokens and wanted > 2:
        wanted -= 1
    found: dict[str, Any] = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor) or not value.ndim:
            found[name] = value
            continue
        is_decoder = name.startswith("decoder_") or (name == "labels" and any(n.startswith("decoder_") for n in batch))
        stack = "decoder_" if is_decoder else ""
        piece = value
        # Over pairs of tokens, where these come first: cut along both axes.
        if shape[0] > 1 and shape[0] != shape[1] and value.shape == (shape[0],) * 2:
            picked = torch.tensor(rows[:wanted], device=value.device)
            piece = value[picked][:, picked]
        elif value.ndim >= 2 and value.shape[0] == shape[0] and (name in numbers or value.shape[1] == shape[1]):
            length = min(value.shape[1], DECODER_TOKENS if is_decoder else tokens)
            told = _real(numbers, stack, tuple(value.shape[:2]), real)
            taken = []
            for row in rows[:wanted]:
                columns = told[row].nonzero().flatten()
                if not len(columns):
                    columns = torch.arange(length)
                # Too few real tokens are gone through again.
                columns = columns.repeat(-(-length // len(columns)))[:length]
                taken.append(value[row, columns.to(value.device)])
            if len(taken) == 1:
                taken.append(taken[0].roll(1, 0))
            piece = torch.stack(taken)
        else:
            if value.shape[0] == shape[0]:
                piece = value[torch.tensor(rows[:wanted], device=value.device)]
                piece = torch.cat([piece, piece]) if wanted == 1 else piece
            elif value.shape[0] in cut:
                piece = piece[: cut[value.shape[0]]]
                if value.ndim == 2 and value.shape[1] == value.shape[0]:  # over pairs of tokens
                    piece = piece[:, : cut[value.shape[0]]]
            if value.ndim == 2 and value.shape == shape[::-1]:
                piece = piece[:, : max(wanted, 2)]
        if value.ndim > 2 and value.shape[0] == shape[0]:
            for axis in range(2, value.ndim):
                if value.shape[axis] == shape[1] and value.shape[1] in {1, shape[1]}:  # over pairs of tokens
                    piece = piece.narrow(axis, 0, min(tokens, shape[1]))
        found[name] = piece.clone()
    return found


def _numbers(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The whole numbers of a batch along two axes, masks among them."""
    return {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim == 2 and not v.is_floating_point()}


def _token_numbers(batch: Mapping[str, Any]) -> Tensor | None:
    """The token numbers of a batch, whose axes are those of sequences and tokens. A square mask over pairs of tokens may come
    first, and has no axis of sequences: token numbers are no booleans."""
    return min(_numbers(batch).values(), key=lambda t: t.dtype == torch.bool, default=None)


def _real(numbers: Mapping[str, Tensor], stack: str, shape: tuple[int, ...], real: Tensor | None) -> Tensor:
    """Which tokens of tensors of this shape are real, as far as the batch's masks of this stack say so."""
    if real is not None and tuple(real.shape) == shape:
        return real.cpu()
    mask = numbers.get(f"{stack}attention_mask")
    if mask is not None and tuple(mask.shape) == shape:
        return _marked_real(mask).cpu()
    return torch.ones(shape, dtype=torch.bool)


def _marked_real(mask: Tensor) -> Tensor:
    """Which tokens a mask over tokens says are real: those with a 1. Without any 1 all are: there a 1 stands for padding."""
    marked = mask.bool()
    return marked if bool(marked.any()) else ~marked


def _first_sequences(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The first 3 sequences of a batch: what has the length of the first tensor is cut along its first axis."""
    size = next((t.shape[0] for t in batch.values() if isinstance(t, Tensor) and t.ndim), 1)

    def first(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != size:
            return value
        return torch.cat([value, value]) if size == 1 else value[:SEQUENCES].clone()

    return {name: first(value) for name, value in batch.items()}
