"""Numbers made of a model's output that effects can be asked about: a difference of two logits, the loss of the next token.

Anything callable will do instead: it is given what the model returns, and gives one number for each sequence, or one number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.errors import InputError

Token = str | int


@dataclass(frozen=True)
class LogitDifference:
    """The logit of one token less that of another, at one place of each sequence. See `logit_difference`."""

    target: Sequence[Token]
    against: Sequence[Token]
    position: int = -1

    @property
    def name(self) -> str:
        """What it is called in a record."""
        target, against = set(_spelled(self.target)), set(_spelled(self.against))
        if len(target) != 1 or len(against) != 1:
            return "target logit − other logit"
        return f"logit of {target.pop()} − logit of {against.pop()}"

    def of(self, sequences: int, mask: Tensor | None, tokenizer: Any) -> Callable[[Any], Tensor]:
        """The metric for a batch of so many sequences. mask [sequence, token]: True for a real token, None where all are."""
        columns = [
            _ids(each, sequences, tokenizer, what)
            for each, what in ((self.target, "target"), (self.against, "against"))
        ]

        def metric(output: Any) -> Tensor:
            rows = _at(_logits(output), mask, self.position)
            target, against = (torch.tensor(ids, device=rows.device)[:, None] for ids in columns)
            known = all(0 <= number < rows.shape[-1] for ids in columns for number in ids)
            if not known or rows.shape[0] != sequences:
                raise InputError(
                    f"attribute: expected logits of {sequences} sequences that hold these tokens, got {list(rows.shape)}. "
                    "The model may have no language-model head. Load it with one, or pass a metric of your own."
                )
            return (rows.gather(-1, target) - rows.gather(-1, against))[:, 0]

        return metric


@dataclass(frozen=True)
class NextTokenLoss:
    """The mean loss of the next token in each sequence, in nats. See `next_token_loss`."""

    ids: str = "input_ids"
    name: str = "loss of the next token"

    def of(self, batch: Any, mask: Tensor | None) -> Callable[[Any], Tensor]:
        """The metric for a batch. mask [sequence, token]: True for a real token, None where all are."""
        if self.ids not in batch:
            raise InputError(
                f"attribute: expected {self.ids!r} in the batch, got {', '.join(batch)}. The loss is that of these tokens. "
                "Pass next_token_loss(ids=...) with the name of the token numbers."
            )

        def metric(output: Any) -> Tensor:
            logits = _logits(output)[:, :-1]
            ids = batch[self.ids][:, 1:].to(logits.device)
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
                ids.flatten(),
                reduction="none",
            ).view(ids.shape)
            real = torch.ones_like(losses) if mask is None else (mask[:, 1:] & mask[:, :-1]).to(losses)
            return (losses * real).sum(-1) / real.sum(-1).clamp(min=1)

        return metric


def logit_difference(
    target: Token | Sequence[Token], against: Token | Sequence[Token], *, position: int = -1
) -> LogitDifference:
    """The logit of `target` less that of `against`: by how much the model prefers one continuation to another.

    target, against: a token as a number, or as a text that is one token (mind the space before a word: `" Paris"`). One for all
    sequences, or a list with one for each. position: counted over the real tokens of each sequence, the last one by default.

        uc.attribute(model, prompts, uc.logit_difference(" Mary", " John"), tokenizer=tokenizer)
    """
    return LogitDifference(_listed(target), _listed(against), position)


def next_token_loss(ids: str = "input_ids") -> NextTokenLoss:
    """The mean loss of the next token, one number for each sequence. ids: the name of the token numbers in the batch.

    It is not affine in the logits: direct effects are those of its linearisation."""
    return NextTokenLoss(ids)


def _listed(tokens: Token | Sequence[Token]) -> tuple[Token, ...]:
    return (tokens,) if isinstance(tokens, str | int) else tuple(tokens)


def _spelled(tokens: Sequence[Token]) -> list[str]:
    return [repr(token) if isinstance(token, str) else f"token {token}" for token in tokens]


def _ids(tokens: Sequence[Token], sequences: int, tokenizer: Any, what: str) -> list[int]:
    if len(tokens) not in {1, sequences}:
        raise InputError(
            f"attribute: expected one {what} for all prompts, or one for each of {sequences}, got {len(tokens)}. "
            "Give as many as there are prompts."
        )
    found = [token if isinstance(token, int) else _id(token, tokenizer, what) for token in tokens]
    return found * sequences if len(found) == 1 else found


def _id(text: str, tokenizer: Any, what: str) -> int:
    if tokenizer is None:
        raise InputError(
            f"attribute: expected a tokenizer to look {text!r} up with, got none. Pass tokenizer=..., or the token's number."
        )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = " ".join(repr(tokenizer.decode([i])) for i in ids[:6])
        raise InputError(
            f"attribute: expected a {what} of one token, got {text!r}, which is {len(ids)} ({pieces}). "
            "A word inside a sentence often begins with a space. Choose a word that is one token."
        )
    return int(ids[0])


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    return next(t for t in tensors_in(output) if t.is_floating_point())


def _at(logits: Tensor, mask: Tensor | None, position: int) -> Tensor:
    """The rows [sequence, token number] at a position among the real tokens."""
    if logits.ndim == 2:
        return logits
    if mask is None or bool(mask.all()):
        mask = logits.new_ones(logits.shape[:2], dtype=torch.bool)
    if mask.shape != logits.shape[:2]:
        raise InputError(
            f"attribute: expected a row of logits for each token of the mask, got {list(logits.shape[:2])} for {list(mask.shape)}. "
            "The model may have tokens of its own. Pass prompts without padding, or a metric of your own."
        )
    rows = []
    for own, real in zip(logits, mask.to(logits.device), strict=True):
        places = real.nonzero().flatten()
        if not -len(places) <= position < len(places):
            raise InputError(
                f"attribute: expected a position among the {len(places)} tokens of each sequence, got {position}. They are counted "
                "from 0, or from the last one with -1. Choose another."
            )
        rows.append(own[places[position]])
    return torch.stack(rows)
