"""What a random model says of itself, from inside its own forward.

A `Switches` object is shared by all parts of one model. It can carry a `Recorder`, which takes note of every true value
where the model computes it, and it can switch parts off, by the model's own `if`. With neither, no operation is added and no
bit of the output changes.

What counts as the truth, where that could be asked:

* **Weights.** A is the matrix that multiplies the values, whatever happened after the softmax. A mask after the softmax
  without renormalisation, a sink, a column of zeros: rows of A then do not sum to one. Entropy, normalised entropy and key
  share are those of the row scaled to sum to one over its *allowed* keys, as `uncollapse.mixing` defines them. A sink's column
  is no key, even where the model keeps it and gives it a value of zeros.
* **Differences.** Two softmaxes with a product each may count as heads of their own, as `uc.head_contributions` says; then the
  contributions of the two add up to those of one head.
* **Signs.** A difference of two softmaxes, or heads that are mixed after the softmax, give weights of either sign and no
  entropy. Attention over channels has no weights of tokens at all. Sigmoid and linear attention have an A, but no softmax:
  `max_logit` and `entropy_floor` do not exist.
* **Logits.** What the softmax saw of an allowed pair: scaled, capped, with its position bias, before the mask.
* **Allowed pairs.** Those the model's mask was built from, whatever number it writes for a forbidden pair. Padded queries are
  no rows, and padded keys are forbidden.
* **Heads.** In the order in which the output projection reads them. Their number is the model's own.
* **Contributions.** Head h's part of the projection's input (behind gates) times its rows of the effective W_O, adapters
  included.
* **Tokens.** Those of the stream. A beginning that the model puts in front of every sequence is one more.

What is left when a part is switched off (`uncollapse.interventions.without` has the words):

* A block adds a·x + b·f(x), a and b being 1 or scales, fixed or learned, on either operand and however the addition is written.
  Without the sublayer a·x is left, without the residual b·f(x). A norm behind the addition goes with its sublayer, and so
  does a norm between the sublayer and the addition.
* In a parallel block, x + f(x) + g(x), the two share the residual. Leaving out the residual of one alone has no meaning there.
* A norm is the whole map from the stream to what reads it: its gain and shift belong to it, also where an embedding conditions
  them. A factor right behind a norm and before the addition can be either, its gain or b: both are right. Query-key norms, the
  embedding's norm and the final norm stay.
* Without the mask every real token may attend to every real token; padding stays hidden in the way the model hides it. Where a
  window or a causal order is written after the softmax, it is gone from there; a renormalisation behind it stays.
* Without positions every token stands at position 0: one row of a table, one angle, no distance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

PARTS = ("mlp", "attention", "residual", "attention-residual", "mlp-residual", "norm", "mask", "positions")


@dataclass
class AttentionTruth:
    """One attention of one batch. Arrays in float64 with the axes [sequence, head, query, key], and [.., width] for vectors.

    `kind` is `softmax`, `sigmoid`, `linear`, `difference` (of softmaxes: weights of either sign) or `channels`; `weights` and
    `logits` are None where there are none. `scaled` are weights whose rows sum to one over the keys that are tokens, of a fused
    call: it never makes those beside its sink, which may underflow. `parts` are the two softmaxes of a difference. `projected` is
    the output projection's output [sequence, token, width], `matrix` and `bias` its effective map, `read` what it reads [sequence,
    token, head, head width].
    """

    kind: str
    weights: np.ndarray | None = None
    logits: np.ndarray | None = None
    allowed: np.ndarray | None = None
    values: np.ndarray | None = None
    mixed: np.ndarray | None = None
    parts: tuple[np.ndarray, np.ndarray] | None = None
    read: np.ndarray | None = None
    matrix: np.ndarray | None = None
    bias: np.ndarray | None = None
    projected: np.ndarray | None = None
    scaled: np.ndarray | None = None

    def found(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Weights, allowed pairs, values and mixed values, where all of them are there."""
        every = [a for a in (self.weights, self.allowed, self.values, self.mixed) if a is not None]
        weights, allowed, values, mixed = every
        return weights, allowed, values, mixed

    @property
    def contributions(self) -> np.ndarray:
        """[sequence, token, head, width]."""
        assert self.read is not None
        assert self.matrix is not None
        heads, width = self.read.shape[2:]
        return np.einsum("bthd,hdo->btho", self.read, self.matrix.reshape(heads, width, -1))


@dataclass
class Truth:
    """One batch: the real tokens [sequence, token] of the stream, the streams [sequence, token, width] (what enters the first
    block, then what each leaves), and each block's attention. `begun`: the first stream once it has been mixed with itself, where
    blocks mix the embedding in: a·x + b·x is the same cloud but for its roundings, and which of the two a block that is no module
    begins with nobody can say."""

    real: np.ndarray
    streams: list[np.ndarray] = field(default_factory=list)
    begun: np.ndarray | None = None
    attention: dict[int, AttentionTruth] = field(default_factory=dict)


class Recorder:
    """Takes note of values, copied to float64 at once: a model may go on to change them in place."""

    def __init__(self) -> None:
        self.truth = Truth(np.zeros((0, 0), dtype=bool))
        self.allowed = torch.zeros(0, 0, 0, dtype=torch.bool)

    def tokens(self, real: Tensor) -> None:
        """The real tokens [sequence, token]."""
        self.truth.real = real.detach().numpy().copy()

    def pairs(self, allowed: Tensor) -> None:
        """The allowed pairs [sequence, query, key] of the block that comes."""
        self.allowed = allowed

    def stream(self, x: Tensor, token_first: bool) -> None:
        """A stream between blocks."""
        self.truth.streams.append(array(x.transpose(0, 1) if token_first else x))

    def begin(self, x: Tensor, token_first: bool) -> None:
        """The first stream, mixed with itself."""
        self.truth.begun = array(x.transpose(0, 1) if token_first else x)

    def of(self, block: int, kind: str = "softmax") -> AttentionTruth:
        """The truth of this block's attention, to be filled in."""
        return self.truth.attention.setdefault(block, AttentionTruth(kind))

    def mixing(
        self,
        block: int,
        weights: Tensor | None,
        values: Tensor,
        mixed: Tensor,
        logits: Tensor | None,
        axes: tuple[str, str, str] = ("b h q k", "b h k d", "b h q d"),
        kind: str = "softmax",
    ) -> None:
        """One attention. `axes` are those of weights (and logits), values and mixed values; `b*h` is one axis with the heads
        inside. Several calls for one block are further heads."""
        size = {"b": self.allowed.shape[0]}
        of_weights, of_values, of_mixed = axes
        found = {
            "weights": None if weights is None else unfolded(weights, of_weights, "b h q k", size),
            "logits": None if logits is None else unfolded(logits, of_weights, "b h q k", size),
            "values": unfolded(values, of_values, "b h k d", size),
            "mixed": unfolded(mixed, of_mixed, "b h q d", size),
        }
        of_mixed_heads, of_value_heads = found["mixed"], found["values"]
        assert of_mixed_heads is not None
        assert of_value_heads is not None
        heads, own = of_mixed_heads.shape[1], of_value_heads.shape[1]
        if own != heads:
            found["values"] = np.repeat(of_value_heads, heads // own, 1)
        one = self.of(block, kind)
        for name, value in found.items():
            before = getattr(one, name)
            setattr(one, name, value if before is None or value is None else np.concatenate([before, value], 1))
        one.allowed = self.allowed[:, None].numpy().copy()


@dataclass
class Switches:
    """What is switched off, by part and block, and the recorder if one is running. Shared by all parts of a model."""

    off: Mapping[str, frozenset[int]] = field(default_factory=dict)
    recorder: Recorder | None = None
    block: int = 0  # the number of the block that is running: a layer may run more than once

    def is_off(self, part: str) -> bool:
        """Whether this part is left out of the block that is running."""
        return self.block in self.off.get(part, ())

    @contextlib.contextmanager
    def without(self, parts: Mapping[str, frozenset[int]]) -> Iterator[None]:
        """Within the block the model leaves these parts out by itself."""
        before, self.off = self.off, parts
        try:
            yield
        finally:
            self.off = before

    @contextlib.contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Within the block the model takes notes."""
        self.recorder = Recorder()
        try:
            yield self.recorder
        finally:
            self.recorder = None


def array(tensor: Tensor) -> np.ndarray:
    """A copy in float64."""
    return tensor.detach().to(torch.float64).numpy().copy()


def unfolded(tensor: Tensor, axes: str, wanted: str, sizes: Mapping[str, int]) -> np.ndarray:
    """`tensor` with its axes apart and in the wanted order; an axis it lacks has size 1. `h*b` is an axis of batch inside head."""
    names: list[str] = []
    shape: list[int] = []
    for axis, size in zip(axes.split(), tensor.shape, strict=True):
        inner = axis.split("*")
        known = {n: sizes[n] for n in inner if n in sizes and len(inner) > 1}
        names += inner
        rest = size // int(np.prod(list(known.values()) or [1]))
        shape += [size] if len(inner) == 1 else [known.get(n, rest) for n in inner]
    whole = tensor.detach().reshape(shape)
    for name in wanted.split():
        if name not in names:
            whole, names = whole.unsqueeze(0), [name, *names]
    return array(whole.permute([names.index(name) for name in wanted.split()]))
