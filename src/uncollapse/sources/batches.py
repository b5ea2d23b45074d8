"""Batches of token sequences: made from text, or made by somebody else and looked over."""

from __future__ import annotations

import hashlib
import inspect
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from uncollapse.errors import InputError
from uncollapse.wrappers import seen_through

IDS = ("input_ids", "decoder_input_ids")
MASKS = ("attention_mask", "decoder_attention_mask")


def tokenize(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    max_tokens: int = 128,
    batch_size: int = 16,
    tokenizer_problem: str = "",
    keeps_order: bool = False,
) -> list[dict[str, Tensor]]:
    """Batches of token ids, one text a sequence, cut at `max_tokens`, longest sequences first, unless it `keeps_order`.

    Sorting by length keeps the padding, and so time and memory, small; longest first means that what does not fit into
    memory fails at once and not at the end. Sequences are padded within their batch only, on the tokenizer's own side.
    A tokenizer without a padding token (GPT-2, Llama) is left as it is: its end token fills the gaps, and
    `attention_mask` hides them. `tokenizer_problem` is repeated where there is no tokenizer.

    Of a text that is much longer than `max_tokens`, only the beginning is tokenised, after a check that the rest changes nothing.

    Raises `InputError` naming the text where one is empty or has fewer than two tokens.
    """
    if tokenizer is None:
        raise InputError(
            "tokenize: expected a tokenizer beside the model, got none. "
            f"{tokenizer_problem or 'The model came without one.'} "
            "Save a tokenizer into the model's folder, or pass tokenizer= or batches= from Python."
        )
    if not isinstance(texts, str) and isinstance(texts, Iterable):
        texts = list(texts)  # an array or a generator of them will do
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(
            "tokenize: expected a list of texts, got "
            f"{'one text' if isinstance(texts, str) else 'a list with something else in it'}. "
            "Each text is one sequence. Pass texts=[text, ...]."
        )
    if not texts:
        raise InputError("tokenize: expected at least one text, got none. The list is empty. Pass texts=[text, ...].")
    limit = getattr(tokenizer, "model_max_length", None)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0):
        raise InputError(
            f"tokenize: expected a tokenizer whose model_max_length is a positive number, got {reprlib.repr(limit)}. "
            "Its tokenizer_config.json may be broken. Correct it there, or set tokenizer.model_max_length."
        )
    if limit is not None and max_tokens > limit:
        raise InputError(
            f"tokenize: expected max_tokens up to {limit}, got {max_tokens}. "
            f"The tokenizer says that its model takes no longer sequences. Set max_tokens to {limit}."
        )
    if max_tokens < 2:
        raise InputError(
            f"tokenize: expected max_tokens of 2 or more, got {max_tokens}. "
            "A single token has no rank to lose. Set max_tokens to 128."
        )
    if batch_size < 1:
        raise InputError(
            f"tokenize: expected a batch_size of 1 or more sequences, got {batch_size}. "
            "A batch holds at least one sequence. Set batch_size to 16."
        )
    encoded = [_encoded(text, number, len(texts), tokenizer, max_tokens) for number, text in enumerate(texts, 1)]
    if not keeps_order:
        encoded.sort(key=lambda sequence: -len(sequence["input_ids"]))
    return [_padded(encoded[start : start + batch_size], tokenizer) for start in range(0, len(encoded), batch_size)]


def _encoded(text: str, number: int, count: int, tokenizer: Any, max_tokens: int) -> dict[str, list[int]]:
    which = f"text {number} of {count} ({text[:30]!r}{'…' if len(text) > 30 else ''})"
    try:
        encoding = tokenizer(_deciding(text, tokenizer, max_tokens), truncation=True, max_length=max_tokens)
        ids = list(encoding["input_ids"])
    except _TooFewTokens:
        raise InputError(
            f"tokenize: expected {max_tokens} tokens within {_most(max_tokens)} characters, got fewer in {which}. "
            "It may be one endless word, or white space. Leave that text out."
        ) from None
    except Exception as error:  # some tokenizers want words with boxes, or lack the token for what they do not know
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"tokenize: expected a tokenizer that takes plain text, got {type(tokenizer).__name__}, which failed on "
            f"{which}: {reason}. It may need another kind of input. Pass batches= that it made its own way."
        ) from error
    added = set(getattr(tokenizer, "all_special_ids", ())) - {getattr(tokenizer, "unk_token_id", None)}
    if not text or text.isspace() or not set(ids) - added:
        raise InputError(
            f"tokenize: expected words in every text, got none in {which}. "
            "White space and control characters are no tokens. Leave that text out."
        )
    if len(ids) < 2:
        raise InputError(
            f"tokenize: expected 2 or more tokens in every text, got 1 in {which}. "
            "A single token has no rank to lose. Leave that text out, or make it longer."
        )
    kept = {key: list(values) for key, values in encoding.items() if len(values) == len(ids)}
    return kept | {"attention_mask": [1] * len(ids)}


class _TooFewTokens(Exception):  # noqa: N818 - a signal between two functions of this module
    pass


def _most(max_tokens: int) -> int:
    return max(2**22, 256 * max_tokens)


def _deciding(text: str, tokenizer: Any, max_tokens: int) -> str:
    """The part of a long text that decides its first `max_tokens` tokens; of a text of usual length, all of it.

    A tokenizer cuts only after it has done the whole text, at 80 bytes of memory a letter. A part will do where the text goes
    on for at least as many tokens again before the part ends, and where two parts of twice the length (and of lengths that
    differ by one, because some tokenizers group digits from the right) give the same tokens. Where they do not, the part grows.
    """
    left = getattr(tokenizer, "truncation_side", "right") == "left"
    size = max(4096, 32 * max_tokens)

    def part(length: int) -> str:
        return text[-length:] if left else text[:length]

    def ids(length: int, tokens: int) -> list[int]:
        return list(tokenizer(part(length), truncation=True, max_length=tokens)["input_ids"])

    if len(text) <= 8 * size:
        return text
    while 2 * size + 1 < len(text):
        enough = len(ids(size, 2 * max_tokens)) == 2 * max_tokens
        if enough and ids(size, max_tokens) == ids(2 * size, max_tokens) == ids(2 * size + 1, max_tokens):
            return part(size)
        if size >= _most(max_tokens):
            if not enough:
                raise _TooFewTokens
            return text
        size *= 4
    return text


def _padded(sequences: list[dict[str, list[int]]], tokenizer: Any) -> dict[str, Tensor]:
    """The sequences of one batch as tensors of equal length."""
    length = max(len(sequence["input_ids"]) for sequence in sequences)
    candidates = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    pad = next((token for token in candidates if token is not None), 0)
    kind = getattr(tokenizer, "pad_token_type_id", 0)
    fill = {"input_ids": pad, "token_type_ids": kind if isinstance(kind, int) else 0}
    left = getattr(tokenizer, "padding_side", "right") == "left"

    def row(values: list[int], filler: int) -> list[int]:
        gap = [filler] * (length - len(values))
        return gap + values if left else values + gap

    return {key: torch.tensor([row(sequence[key], fill.get(key, 0)) for sequence in sequences]) for key in sequences[0]}


def bound(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a call `model(*args, **kwargs)` gives, by the names of the model's arguments; what has no name is left out."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check_batches(
    batches: Iterable[Mapping[str, Tensor] | Tensor | Sequence[Any]], *, model: nn.Module | None = None
) -> list[dict[str, Tensor]]:
    """The batches as a list of plain dicts, once every one of them is known to be usable. Tensors are not copied.

    Each is a mapping from the model's argument names to tensors, of any modality; flags and numbers may stand beside them. With
    `model` it may also be a tensor, or a tuple, which is given by position: `model(*batch)`. A sequence needs two or more tokens
    that are not padding. With `model`, ids must be in its vocabulary and sequences no longer than its table of
    positions; otherwise they end in an index error deep inside the model.

    Raises `InputError` naming the batch, and the sequence in it.
    """
    if isinstance(batches, Mapping | str | Tensor) or not isinstance(batches, Iterable):
        raise InputError(
            f"check_batches: expected a list of dicts of tensors, got one {type(batches).__name__}. "
            "A single batch goes into a list, too. Pass batches=[batch]."
        )
    checked = [_checked(batch, f"batches[{number}]", model) for number, batch in enumerate(batches)]
    if not checked:
        raise InputError(
            "check_batches: expected at least one batch, got none. An iterator can be read only once. Pass a list."
        )
    return checked


def _checked(given: Any, where: str, model: nn.Module | None) -> dict[str, Tensor]:
    batch = _named(given, where, model)
    for key, value in batch.items():
        if value is None or isinstance(value, (bool, int, float, str)):
            continue
        if not isinstance(value, Tensor) or value.numel() == 0:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise InputError(
                f"check_batches: expected {where}[{key!r}] to be a tensor with something in it, got {got}. "
                "A tokenizer returns lists unless it is asked for tensors. Pass return_tensors='pt' to it."
            )
        if key in IDS and value.ndim != 2:
            raise InputError(
                f"check_batches: expected {where}[{key!r}] with the axes (batch token), got {value.ndim} axes of "
                f"sizes {tuple(value.shape)}. A single sequence is a batch of one. Pass ids[None]."
            )
    tokens = _token_shape(batch)
    for key in MASKS:
        mask = token_mask(batch, key)
        if mask is None:
            continue
        # Token numbers [token, sequence] beside a mask [sequence, token]: fairseq's, and torch's own layers without batch_first.
        turned = None if tokens is None else tokens[::-1]
        if key == "attention_mask" and tokens is not None and mask.shape not in {tokens, turned}:
            raise InputError(
                f"check_batches: expected {where}[{key!r}] of shape (batch token) {tuple(tokens)}, got "
                f"{tuple(mask.shape)}. They may come from two batches. Pass the mask made with these tokens."
            )
        real = mask.sum(dim=1).tolist()
        short = next((row for row, count in enumerate(real) if count < 2), None)
        if short is not None:
            raise InputError(
                f"check_batches: expected 2 or more tokens in every sequence, got "
                f"{'a single token' if real[short] else 'nothing but padding'} in sequence {short} of {where} by its "
                f"{key}. There is no rank to lose in it. Leave that sequence out."
            )
    if tokens is not None and tokens[1] < 2:
        raise InputError(
            f"check_batches: expected 2 or more tokens in every sequence, got shape (batch token) {tuple(tokens)} in "
            f"{where}. A single token has no rank to lose. Pass longer sequences."
        )
    if model is not None:
        _require_fit(batch, where, model)
    return dict(batch)


def _named(given: Any, where: str, model: nn.Module | None) -> dict[str, Any]:
    """A batch by the names of the model's arguments."""
    items = (given,) if isinstance(given, Tensor) else tuple(given) if isinstance(given, (tuple, list)) else ()
    batch = dict(given) if isinstance(given, Mapping) else {}
    if items and model is not None and any(isinstance(item, Tensor) for item in items):
        batch = bound(model, items, {})
        if len(batch) != len(items):
            raise InputError(
                f"check_batches: expected {where} with as many items as {type(model).__name__}.forward takes by position "
                f"({len(batch)}), got {len(items)}. A data loader may yield labels, too. Pass a dict of the model's arguments."
            )
    if not any(isinstance(value, Tensor) for value in batch.values()) and not (batch and isinstance(given, Mapping)):
        got = "an empty one" if isinstance(given, Mapping) else f"a {type(given).__name__}"
        raise InputError(
            f"check_batches: expected {where} to be a dict from the model's argument names to tensors, got {got}. "
            "A data loader may yield tuples. Pass {'input_ids': ids, 'attention_mask': mask}."
        )
    return batch


def _require_fit(batch: Mapping[str, Tensor], where: str, model: nn.Module) -> None:
    words, ids, tokens = _word_table(model), batch.get("input_ids"), _token_shape(batch)
    if ids is not None and words is not None:
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= words.num_embeddings:
            raise InputError(
                f"check_batches: expected token ids from 0 to {words.num_embeddings - 1}, got {low} to {high} in "
                f"{where}. The tokenizer may belong to another model. Use the one saved with this model."
            )
    limit = position_limit(model)
    if tokens is not None and limit is not None and tokens[1] > limit:
        raise InputError(
            f"check_batches: expected up to {limit} tokens in a sequence, got {tokens[1]} in {where}. "
            f"The model has positions for no more. Set max_tokens to {limit}, or pass shorter batches."
        )


def position_limit(model: nn.Module) -> int | None:
    """The longest sequence the model's table of positions allows, or None where positions are not looked up in one.

    The table is found by its length: an embedding with as many rows as the configuration has positions, or a few more.
    Rows up to the padding index are never used (RoBERTa), and neither are those an offset adds (OPT, BART). Tables of
    relative positions do not limit the length.
    """
    positions = getattr(getattr(seen_through(model), "config", None), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    words = _word_table(model)
    limits = [
        min(positions, module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and module is not words
        and "rel" not in name
        and 0 <= module.num_embeddings - positions < 8
    ]
    return min(limits, default=None)


def _word_table(model: nn.Module) -> nn.Embedding | None:
    look_up: Any = getattr(model, "get_input_embeddings", None)
    try:
        table = look_up() if look_up is not None else None
    except NotImplementedError:  # transformers' answer for models that take no words
        return None
    return table if isinstance(table, nn.Embedding) else None


def token_mask(batch: Mapping[str, Tensor], key: str = "attention_mask") -> Bool[Tensor, "batch token"] | None:
    """True where a token is real, or None where the batch has no such mask (then every token is).

    Raises `InputError` for a mask with more axes than (batch token) or other values than 0 and 1: a mask over pairs of
    tokens does not say which tokens are padding, and in an additive one a zero means the opposite.
    """
    mask = batch.get(key)
    if mask is None:
        return None
    if mask.ndim != 2:
        raise InputError(
            f"token_mask: expected {key} with the axes (batch token), got {mask.ndim} axes of sizes "
            f"{tuple(mask.shape)}. A mask over pairs of tokens does not say which tokens are padding. "
            "Pass the mask with two axes."
        )
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError(
            f"token_mask: expected {key} with 1 for a token and 0 for padding, got values from "
            f"{mask.min().item():g} to {mask.max().item():g}. It may be an additive mask. Pass zeros and ones."
        )
    return mask.bool()


def fingerprint(batches: Sequence[Mapping[str, Any]]) -> str:
    """What tells these batches from any others: a digest of their names, shapes, formats and bits."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            value = batch[name]
            if isinstance(value, Tensor):
                digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            else:
                digest.update(f"{name}{value!r}".encode())
    return digest.hexdigest()[:16]


def sequence_count(batches: Iterable[Mapping[str, Tensor]]) -> int:
    """How many sequences the batches hold."""
    return sum(
        (_token_shape(batch) or next(t for t in batch.values() if isinstance(t, Tensor)).shape)[0] for batch in batches
    )


def token_count(batches: Iterable[Mapping[str, Tensor]]) -> int | None:
    """How many real tokens the batches hold, or None where they do not say: images become tokens inside the model."""
    total = 0
    for batch in batches:
        mask, tokens = token_mask(batch), _token_shape(batch)
        if mask is not None:
            total += int(mask.sum())
        elif tokens is not None:
            total += tokens.numel()
        else:
            return None
    return total


def _token_shape(batch: Mapping[str, Tensor]) -> torch.Size | None:
    """(batch, token) of the words that go in, or None where images or sound do."""
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    return None if tokens is None else tokens.shape[:2]
