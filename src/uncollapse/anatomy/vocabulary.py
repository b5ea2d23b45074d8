"""Where a model keeps its blocks, attention, output projections, norms, MLPs and residual additions: traced, then proved.

No table of architectures. One forward pass of a few tokens is recorded as a dataflow graph (`tracing`), the parts are read
off the graph (`reading`), and the picture is then proved on the live model (`proof`) before anything is measured with it.
This module is the vocabulary. An `Anatomy` is plain data: qualified module names, call numbers and `Point`s, so it
survives a device move and can be printed.

How the graph is read
* A *residual addition* is an addition one of whose operands (the stream) is, possibly behind further additions, casts and
  scalings, a value that the other operand (the update) depends on through a learned matrix product. Biases, rotary terms,
  masks, the cubic term of GELU and mixture-of-experts sums are none.
* The *parts* of an update are its summands. A part with scaled dot-product attention inside, fused or as
  product → softmax → product, is `attention`; `cross` when its values do not come from this stream; else `mlp`, or
  `mixer` when the proof sees it move information between tokens.
* The *output projection* is the first learned product after the attention.
* *Norms* are told by behaviour: a leaf module with f(16x) = f(256x) that is not constant; `layer` if it also ignores a
  shift along the features, else `rms`. Names lie.
* A *block* is the deepest module call that holds one self-attention addition and the additions that belong to it.

When not to use it: a model that adds several streams, or that has no module for a block, is refused (`UnsupportedModel`);
pass a `Layout` there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from uncollapse.anatomy.interception import Handler, Point, chosen_operand
from uncollapse.errors import UnsupportedModel

PartKind = Literal["attention", "cross", "mlp", "mixer"]
NormRole = Literal["before", "after", "inner", "post"]
Placement = Literal["pre", "post", "sandwich", "output", "none"]
STREAM = -1  # the leaf of an addition tree that is the residual stream itself; parts are leaves 0, 1, …


@dataclass(frozen=True)
class ModuleCall:
    """The `call`-th run, counted from 0, of the module with this qualified name in one forward pass."""

    name: str
    call: int


@dataclass(frozen=True)
class Norm:
    """One norm call and its place: `before` a part, `after` it, `inner` (query-key norms), or `post` on the stream. `place`
    is the part's number (None: shared by parallel parts), for `post` the number of the residual addition it follows."""

    module: ModuleCall
    kind: Literal["layer", "rms"]
    role: NormRole
    place: int | None


@dataclass(frozen=True)
class AttentionCall:
    """One attention call. `score` is the fused call or the softmax; `product` the product of its weights with the values
    (the fused call itself, or the matrix product after the softmax), whose operand `value_operand` holds the values.
    `projection` is the output projection: a module's run, or the point of a product written in the attention's own code.
    `masking` are the operations between the products of queries and keys and the softmax that may forbid a pair.
    `value_bias` and `output_bias` say whether values and output are made with a bias; `heads`, `key_value_heads` and
    `head_width` are the sizes on this model.

    `queries`, `keys` and `values` are the learned products nearest behind the operands of the attention: a module's run, or
    the point of a product in the attention's own code; None where several are met, or none. They may be one and the same.
    `similarity` is the product of queries with keys (the fused call itself; None where several are summed before the
    softmax), with the numbers of its two operands."""

    score: Point
    product: Point
    value_operand: int
    heads: int
    key_value_heads: int
    head_width: int
    projection: ModuleCall | Point | None
    masking: tuple[Point, ...] = ()
    value_bias: bool = False
    output_bias: bool = False
    queries: ModuleCall | Point | None = None
    keys: ModuleCall | Point | None = None
    values: ModuleCall | Point | None = None
    similarity: Point | None = None
    query_operand: int = 0
    key_operand: int = 1


@dataclass(frozen=True)
class Part:
    """One sublayer: what it is, its attention calls (none for an MLP) and the module that runs it, for messages.

    For an MLP, `reads` is the run of the module that makes its first learned product and `writes` that of its last: the input
    of `reads` is what the MLP sees, the input of `writes` its hidden layer. `None` where no module of their own makes them.
    `is_causal` says of attention whether a token can only reach later ones; the proof finds out.
    """

    kind: PartKind
    attention: tuple[AttentionCall, ...]
    module: str
    reads: ModuleCall | None = None
    writes: ModuleCall | None = None
    is_causal: bool = False


@dataclass(frozen=True)
class AdditionNode:
    """One addition of a residual tree. `first` and `second` are the leaves (part numbers, or `STREAM`) under each operand."""

    point: Point
    first: frozenset[int]
    second: frozenset[int]


@dataclass(frozen=True)
class Residual:
    """One residual addition of a block, with the nested additions that sum several parts (parallel attention and MLP).
    The last of `additions` is the outermost. `stream_scales` are factors on the stream operand, `norms_post` the norms that
    the sum passes before it is the stream again (post-norm models)."""

    additions: tuple[AdditionNode, ...]
    parts: tuple[int, ...]
    stream_scales: tuple[float, ...] = ()
    norms_post: tuple[ModuleCall, ...] = ()


@dataclass(frozen=True)
class Block:
    """One block call. The stream enters as argument `stream_input` (position or keyword) and leaves as output
    `stream_output` (`None`: the output itself is the tensor). `token_axis` is 1, 0 in models that put tokens first, and
    `None` where sequences are laid end to end."""

    module: ModuleCall
    stack: Literal["encoder", "decoder"] | None
    placement: Placement
    parts: tuple[Part, ...]
    residuals: tuple[Residual, ...]
    norms: tuple[Norm, ...]
    stream_input: int | str
    stream_output: int | None
    token_axis: int | None = 1

    @property
    def is_parallel(self) -> bool:
        return any(len(r.parts) > 1 for r in self.residuals)


@dataclass(frozen=True)
class Identity:
    """One statement about the live model that was checked: `deviation` is 0 where it holds bit for bit."""

    statement: str
    where: str
    deviation: float


@dataclass(frozen=True)
class Anatomy:
    """The proved picture of a model. `outer_norms` are the norm calls outside the blocks (of the embedding, the final one);
    `proof` lists every identity that was checked; `runs` says how often each module that is a block runs in a pass."""

    blocks: tuple[Block, ...]
    outer_norms: tuple[ModuleCall, ...] = ()
    proof: tuple[Identity, ...] = ()
    runs: tuple[tuple[str, int], ...] = ()

    @property
    def norm_placement(self) -> str:
        """`pre`, `post`, `sandwich`, `output` or `none`, with `, parallel` where attention and MLP share one addition."""
        placements = list(dict.fromkeys(b.placement + (", parallel" if b.is_parallel else "") for b in self.blocks))
        return " / ".join(placements)

    def describe(self) -> str:
        """One line a block, for error messages and the curious."""
        return "\n".join(
            f"{b.module.name}[{b.module.call}] {b.placement}: " + " + ".join(f"{p.kind} ({p.module})" for p in b.parts)
            for b in self.blocks
        )


@dataclass(frozen=True)
class Layout:
    """Where the blocks are, for a model whose blocks tracing cannot tell apart.

    blocks: qualified names of the block modules in the order they run, as in `model.named_modules()`.
    stacks: optionally `"encoder"` or `"decoder"` for each. Everything inside the blocks is still traced and proved.
    """

    blocks: tuple[str, ...]
    stacks: tuple[Literal["encoder", "decoder"] | None, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.blocks or isinstance(self.blocks, str):
            raise UnsupportedModel(
                f"Layout: expected the qualified names of the block modules, got {self.blocks!r}. "
                "Write Layout(blocks=('encoder.0', 'encoder.1'))."
            )
        if self.stacks and len(self.stacks) != len(self.blocks):
            raise UnsupportedModel(
                f"Layout: expected one stack a block ({len(self.blocks)}), got {len(self.stacks)}. Leave stacks out."
            )


def removal(block: Block, parts: Collection[int], *, residual: Collection[int] = ()) -> dict[Point, Handler]:
    """Handlers that leave the given parts out of the block's additions, so that the stream passes there; also the stream,
    wherever all parts that are left are among `residual`. Acts at the addition itself: nothing is rounded twice."""
    handlers: dict[Point, Handler] = {}
    for addition in block.residuals:
        gone = set(parts) & set(addition.parts)
        left = set(addition.parts) - gone
        if left and left <= set(residual):
            gone.add(STREAM)
        for node in addition.additions:
            first, second = node.first - gone, node.second - gone
            if not (first and second):
                handlers[node.point] = _keeping(0 if first or not second else 1)
    return handlers


def _keeping(operand: int) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return chosen_operand(function, args, kwargs, operand)

    return handler
