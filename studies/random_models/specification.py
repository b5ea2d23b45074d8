"""What one random model is made of: a choice for every piece."""

from __future__ import annotations

from dataclasses import dataclass, fields

SIZES = ("seed", "vocabulary", "blocks", "width", "heads", "key_value_heads", "head_width", "batches", "window")
NO_SOFTMAX = ("sigmoid", "linear from a matrix", "linear without a matrix", "channels")
NOT_PROMISED = {  # may be refused: nobody promised to read them
    "attention": (*NO_SOFTMAX, "windows apart", "products summed"),
    "addition": ("torch.addcmul(x, b, f)", "torch.lerp(x, f, 0.4)"),
}
DIFFERENCES = ("difference, one product", "difference, two products")


@dataclass(frozen=True)
class Specification:
    """Sizes first (`batches` are pairs of sequences and tokens), then the pieces by name; `drawing` has the choices."""

    seed: int
    vocabulary: int
    blocks: int
    width: int
    heads: int
    key_value_heads: int
    head_width: int
    batches: tuple[tuple[int, int], ...]
    window: int
    # The stream and how the model is called.
    stream: str
    signature: str
    given: str
    entries: str
    ids: str
    state: str
    route: str
    wrapper: str
    output: str
    dtype: str
    # Attention.
    attention: str
    inputs: str
    queries: str
    softmax: str
    softcap: str
    gate: str
    mask: str
    masking: str
    forbidden: str
    padding: str
    sink: str
    beginning: str
    projection: str
    adapter: str
    positions: str
    # The block.
    sharing: str
    embedding_again: str
    residuals: str
    placement: str
    norm: str
    norm_home: str
    addition: str
    stream_scale: str
    update_scale: str
    mlp: str
    start: str

    @property
    def pieces(self) -> dict[str, str]:
        """Every choice that is no size."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in SIZES}

    @property
    def is_to_be_read(self) -> bool:
        """Whether a reader has no excuse: softmaxes over the tokens of a sequence, and a sum that is written as one."""
        return all(self.pieces[name] not in choices for name, choices in NOT_PROMISED.items())

    @property
    def token_first(self) -> bool:
        return self.stream == "token first"

    @property
    def is_parallel(self) -> bool:
        return self.placement.startswith("parallel")

    @property
    def has_mask(self) -> bool:
        """Whether some pairs of real tokens are forbidden."""
        return self.mask != "none"
