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
* The *output projection* is the first learned product after the attention, where the proof sees all that the heads write go
  through it; else the whole map from the mixed values to what is added.
* *Norms* are told by behaviour, whether modules, functions or written out: a piece of the graph with f(16x) = f(256x) that
  is not constant; `layer` if it also ignores a shift along the features, else `rms` (`norm_reading`). Names lie.
* A *block* is the deepest module call that holds one self-attention addition and the additions that belong to it. Where the
  additions of several blocks stand in one module's own code, each block is one self-attention addition and those after it.
* On its way to an addition the stream may be *carried*: multiplied by numbers, parameters or gates, and added to what does
  not depend on it (`a x + b x0`, skips from earlier blocks, a steering vector). The proof says what may stand there.

* *Several streams side by side* (hyper-connections) are one stream with an axis more. A sublayer reads a mixture of them
  (`Part.read`) and writes to each. Between additions they are mixed with each other, token by token and feature by feature.

When not to use it: streams that a model keeps in tensors of their own are refused (`UnsupportedModel`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from uncollapse.anatomy.interception import Handler, Paths, Point
from uncollapse.anatomy.operands import Lead
from uncollapse.anatomy.summands import left_of
from uncollapse.anatomy.torch_calls import Path
from uncollapse.errors import UnsupportedModel

PartKind = Literal["attention", "cross", "mlp", "mixer"]
NormRole = Literal["before", "after", "inner", "post"]
Placement = Literal["pre", "post", "sandwich", "output", "none"]
PICKS = frozenset(["gather", "index_select", "take_along_dim", "getitem"])  # operations that choose some of the tokens
STREAM = -1  # the leaf of an addition tree that is the residual stream itself; parts are leaves 0, 1, …


@dataclass(frozen=True)
class ModuleCall:
    """The `call`-th run, counted from 0, of the module with this qualified name in one forward pass."""

    name: str
    call: int


@dataclass(frozen=True)
class NormPiece:
    """A norm that is no module's run: `reads` is the operation that first takes its input, as tensor number `operand` of its
    arguments, and `gives` the operation whose result is the norm's, the one numbered `member` where it returns several.
    `obstacle` says why it can be measured but not taken out; empty where it can."""

    reads: Point
    operand: int
    gives: Point
    member: int | None = None
    obstacle: str = ""

    def result(self, output: Any) -> Tensor:
        """The norm's result in what its last operation returned."""
        found: Tensor = output if self.member is None else output[self.member]
        return found

    def __str__(self) -> str:
        return f"{self.gives.operation.partition(' ')[0]} #{self.gives.ordinal} in {self.gives.owner or 'the model itself'}"


@dataclass(frozen=True)
class Fold:
    """Several streams that share axis number `axis` of their tensor with the sequences, or another axis: `streams` of them, beside
    each other where `is_minor`, else one after the other."""

    axis: int
    streams: int
    is_minor: bool

    def opened(self, tensor: Tensor) -> Tensor:
        """The tensor with an axis of the streams' own."""
        return tensor.unflatten(self.axis, (-1, self.streams) if self.is_minor else (self.streams, -1))

    def closed(self, tensor: Tensor) -> Tensor:
        """The tensor as the model has it."""
        return tensor.flatten(self.axis, self.axis + 1)


@dataclass(frozen=True)
class Place:
    """Where a stream can be met: among the arguments of a module's run (`side="in"`), in what it returns (`"out"`), in its
    arguments after it ran (`"written"`: a state that blocks change), or in the result of an operation. `path` leads to the
    tensor inside nested containers and objects (`tracing.tensors_at`). Where several streams are folded into one axis with
    another, `fold` says how, and what is met here has an axis of its own for them."""

    at: ModuleCall | Point
    side: Literal["in", "out", "written"] = "out"
    path: Path = ()
    fold: Fold | None = None


@dataclass(frozen=True)
class Norm:
    """One norm and its place: `before` a part, `after` it, `inner` (query-key norms), or `post` on the stream. `place` is the
    part's number (None: shared by parallel parts), for `post` the number of the residual addition it follows. `module` is the
    run that is the norm; where `piece` is given, the run whose own code holds it."""

    module: ModuleCall
    kind: Literal["layer", "rms"]
    role: NormRole
    place: int | None
    piece: NormPiece | None = None

    @property
    def where(self) -> ModuleCall | NormPiece:
        """What the norm is: a module's run, or a piece of code."""
        return self.piece or self.module

    def __str__(self) -> str:
        return str(self.piece) if self.piece is not None else self.module.name


@dataclass(frozen=True)
class MaskingStep:
    """An operation on the way from the logits to the weights that may forbid a pair, and the number of the operand that would.
    What it forbids is read off that operand in each pass: 0 and one negative number where it is added, booleans where it chooses,
    0 and 1 where it multiplies; of an operation that cuts or replaces (`masking.BY_RESULT`) it is what its result no longer holds
    of the operand. Whether it forbids anything is no matter of the model but of the batch. `axes` says of each axis of its result
    what it holds: `sequence`, `key`, `query`, `head`, both in one, or None. `made`: the operations that may have put a mask into
    this operand beside a bias, and those that made the operand of that, in order, wherever they stand."""

    point: Point
    operand: int
    after_softmax: bool | None = False
    axes: tuple[str | None, ...] = ()
    made: tuple[Point, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class AttentionCall:
    """One attention call. `product` is the product that mixes the values (the fused call itself, or a matrix product), whose
    operand `value_operand` holds the values and `weight_operand` the weights (None for a fused call, which never makes them).
    `score` is the softmax, the exponential of one that is written out, or the fused call; None where the weights are made in
    another way. `logits` is the operation that takes the logits, with the number of that operand. `way` are the operations from
    the first mask or the logits to the weights, in order; `masking` those that may forbid a pair.

    `projection` is the output projection: a module's run, or the point of a product written in the attention's own code.
    `value_bias` and `output_bias` say whether values and output are made with a bias; `heads`, `key_value_heads` and
    `head_width` are the sizes on this model.

    `queries`, `keys` and `values` are the learned products nearest behind the operands of the attention: a module's run, or
    the point of a product in the attention's own code; None where several are met, or none. They may be one and the same.
    `similarity` is the product of queries with keys (the fused call itself; None where several are summed before the
    softmax), with the numbers of its two operands. `pair` are the axes of the weights that hold queries and keys, where the
    product leaves that open and pokes told. `drops_columns`: the softmax also ran over columns that mix no value (a sink).
    `made`: of a fused call, how its mask was made, as in `MaskingStep`. `has_other_data`: its values are joined of several that
    come from data. `serves_weights`: what it mixes reaches what the sublayer adds through the weights of other calls alone.

    The proof adds what the leading axes of the product hold (`lead`, in order), how many of the keys stand `before` those that
    are tokens and belong to none (a sink's column), whether there are as many keys as the stream has tokens (`keys_of_tokens`)
    or queries (`queries_of_tokens`), whether it is one of several that answer for the sublayer's queries in turn, the tokens in
    order (`shares_queries`), whether the weights of a row sum to one in double precision (`sums_to_one`, asked only of those in
    half precision), and, where the call is no mixture of tokens that can be measured, why (`unreadable`)."""

    score: Point | None
    product: Point
    value_operand: int
    heads: int
    key_value_heads: int
    head_width: int
    projection: ModuleCall | Point | None
    weight_operand: int | None = None
    logits: tuple[Point, int] | None = None
    way: tuple[Point, ...] = field(default=(), compare=False)  # a cast more in half precision is the same call
    masking: tuple[MaskingStep, ...] = ()
    drops_columns: bool = False
    value_bias: bool = False
    output_bias: bool = False
    queries: ModuleCall | Point | None = None
    keys: ModuleCall | Point | None = None
    values: ModuleCall | Point | None = None
    similarity: Point | None = None
    query_operand: int = 0
    key_operand: int = 1
    lead: tuple[Lead, ...] = ()
    before: int = 0
    after: int = 0
    keys_of_tokens: bool = False
    queries_of_tokens: bool = False
    shares_queries: bool = False
    sums_to_one: bool | None = field(default=None, compare=False)
    unreadable: str | None = None
    pair: tuple[int, int] | None = None
    made: tuple[Point, ...] = field(default=(), compare=False)
    has_other_data: bool = False
    serves_weights: bool = False
    turns: int = 0
    is_piece: bool = False

    @property
    def is_fused(self) -> bool:
        return self.score == self.product

    @property
    def is_einsum(self) -> bool:
        return self.product.operation == "einsum"

    @property
    def is_plain(self) -> bool:
        """Whether the product's own axes are sequence, head, query, key, in this order, with a softmax over the last."""
        roles = [axis.role for axis in self.lead]
        return roles == ["sequence", "head"] and self.score is not None and self.unreadable is None


@dataclass(frozen=True)
class Gate:
    """A factor on what the heads of an attention mixed, made from data and not from that: tensor `operand` of the operation at
    `point`, before anything learned. The proof adds `orders`: in which order the axes sequence, head, token and width lie in its
    result; one for all heads together, or one for those of each call where the calls lie on each other."""

    point: Point
    operand: int
    orders: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Router:
    """A choice that decides to which of so many `experts` an MLP sends a token: the operation at `point` gives their numbers."""

    point: Point
    experts: int


@dataclass(frozen=True)
class Part:
    """One sublayer: what it is, its attention calls (none for an MLP) and the module that runs it, for messages.

    For an MLP, `reads` is the run of the module that makes its first learned product and `writes` that of its last: the input
    of `reads` is what the MLP sees, the input of `writes` its hidden layer. `None` where no module of their own makes them.
    `is_causal` says of attention whether a token can only reach later ones; the proof finds out.

    Of an attention, `written` is the operation whose result its heads write together: what it adds, before an output norm and
    before factors. Where its calls have no `projection`, W_O is the whole map from the mixed values to that result
    (`output_maps`), unless `no_output_map` says why there is none; of mixed values that have passed the `gates`, if any. Where
    they have one, `features` gives the head of every feature that it reads; empty where the heads lie side by side.

    Of several streams side by side, `read` is where that is made which this sublayer reads of them. `router` is the choice of
    experts of an MLP, if the proof found one. `last_products` are the matrix products that what the part adds is made of
    without another one; of several, those as wide as that, and not the scores of a router or a gate for each head.
    """

    kind: PartKind
    attention: tuple[AttentionCall, ...]
    module: str
    reads: ModuleCall | None = None
    writes: ModuleCall | None = None
    is_causal: bool = False
    written: Point | None = None
    features: tuple[int, ...] = ()
    no_output_map: str = ""
    gates: tuple[Gate, ...] = ()
    read: Place | None = None
    router: Router | None = None
    last_products: tuple[Point, ...] = field(default=(), compare=False)

    @property
    def heads(self) -> int:
        """Heads of all its attention calls; of calls that answer for the queries in turn, which are the same heads again, once."""
        return sum(call.heads for call in self.beside)

    @property
    def beside(self) -> tuple[AttentionCall, ...]:
        """Its calls whose heads are other ones: all of them, or the first."""
        return self.attention[:1] if self.shares_queries or self.in_pieces else self.attention

    @property
    def shares_queries(self) -> bool:
        """Whether its calls answer for its queries in turn."""
        return any(call.shares_queries for call in self.attention)

    @property
    def in_pieces(self) -> bool:
        """Whether the rows of its weights are put together of those of several calls."""
        return any(call.is_piece for call in self.attention)

    @property
    def by_sequence(self) -> bool:
        """Whether its calls mix one sequence at a time, in a loop over them."""
        return any(call.turns for call in self.attention)


@dataclass(frozen=True)
class AdditionNode:
    """One addition of a residual tree. `leaves` are, for each tensor operand of the operation, the leaves under it (part
    numbers, or `STREAM`); empty for an operand that is no summand, such as the factor of `addcmul` or the weight of `lerp`."""

    point: Point
    leaves: tuple[frozenset[int], ...]


@dataclass(frozen=True)
class Residual:
    """One residual addition of a block, with the nested additions that sum several parts (parallel attention and MLP).
    The last of `additions` is the outermost. `norms_post` are the norms that the sum passes before it is the stream again
    (post-norm models). `gates` are the products on the stream's way to the addition with a factor that is made from data
    (highway gates), with the number of that factor among the operands."""

    additions: tuple[AdditionNode, ...]
    parts: tuple[int, ...]
    norms_post: tuple[ModuleCall | NormPiece, ...] = ()
    gates: tuple[tuple[Point, int], ...] = ()


@dataclass(frozen=True)
class StreamAxes:
    """What each axis of a residual stream is, told by influence: along `sequence` nothing reaches anything, along the `token`
    axes the attention reaches, and `width` is the one that the first learned product contracts. `sequence` is None where
    sequences are laid end to end along the token axis. `streams` is the axis of several streams side by side, which sublayers
    read together; None where there is one stream."""

    sequence: int | None
    token: tuple[int, ...]
    width: int
    streams: int | None = None

    def cloud(self, stream: Tensor) -> Tensor:
        """The stream as [sequence, token, width]; a grid of tokens becomes one row of them. With no axis of sequences, all
        rows as one sequence. Of several streams, what they hold of a token stands side by side along the width."""
        if self.streams is not None:
            return self.side_by_side(stream).flatten(2)
        if self.sequence is None:
            return stream.permute(*self.token, self.width).flatten(0, -2).unsqueeze(0)
        return stream.permute(self.sequence, *self.token, self.width).flatten(1, -2)

    def side_by_side(self, stream: Tensor) -> Tensor:
        """Several streams as [sequence, token, stream, width]."""
        assert self.streams is not None
        assert self.sequence is not None
        return stream.permute(self.sequence, *self.token, self.streams, self.width).flatten(1, -3)

    @property
    def within(self) -> StreamAxes:
        """The axes of what a sublayer reads and makes: those of one stream."""
        if self.streams is None:
            return self
        behind = self.streams

        def without(axis: int) -> int:
            return axis - (axis > behind)

        assert self.sequence is not None
        return StreamAxes(without(self.sequence), tuple(map(without, self.token)), without(self.width))

    def stream(self, cloud: Tensor, like: Tensor) -> Tensor:
        """[sequence, token, width] laid out as the stream `like`: the reverse of `cloud`."""
        order = (*(() if self.sequence is None else (self.sequence,)), *self.token, self.width)
        laid = cloud.reshape([like.shape[axis] for axis in order])
        return laid.permute([order.index(axis) for axis in range(like.ndim)])

    @property
    def ndim(self) -> int:
        return (self.sequence is not None) + len(self.token) + 1 + (self.streams is not None)


@dataclass(frozen=True)
class TokenMask:
    """A tensor of the batch that hides tokens from a stack: `tensor` is its name, `real` the value it has at a real token.

    `unit` is `token` where it has the stream's sequence and token axes (the other way round if `is_transposed`), but for as many
    rows of the model's own as come `before` the first and `after` the last; `other` where it counts something else (samples of
    sound, the words of a stream that ends with patches)."""

    tensor: str
    real: bool
    unit: Literal["token", "other"] = "token"
    is_transposed: bool = False
    before: int = 0
    after: int = 0


@dataclass(frozen=True)
class Stack:
    """Blocks that hand one residual stream on, by their numbers; a model may have several: encoder and decoder, two towers.

    masks: the tensors of the batch that hide tokens from it, all of them found by poking. ids: the tensor of token numbers that
    its embedding is made of, `ids_transposed` if its axes are token, sequence. segments_block: where sequences are laid end to
    end, the block whose attention reaches furthest: it tells them apart.
    """

    name: Literal["encoder", "decoder"] | None
    blocks: tuple[int, ...]
    masks: tuple[TokenMask, ...] = ()
    ids: str | None = None
    ids_transposed: bool = False
    segments_block: int | None = None


@dataclass(frozen=True)
class Block:
    """One block. `module` is its run, or the run of the module in whose own code its additions stand, side by side with other
    blocks'; then `label` names it after its attention. The stream enters at `entry` and leaves at `exit`. `axes` says what each
    axis of the stream is, as the proof found it; None with the reason in `axes_reason`."""

    module: ModuleCall
    stack: Literal["encoder", "decoder"] | None
    placement: Placement
    parts: tuple[Part, ...]
    residuals: tuple[Residual, ...]
    norms: tuple[Norm, ...]
    entry: Place
    exit: Place
    axes: StreamAxes | None = None
    axes_reason: str = "not proved yet"
    label: str = ""

    @property
    def name(self) -> str:
        """The block's name in messages."""
        return self.label or self.module.name

    @property
    def chooses_tokens(self) -> bool:
        """Whether the block runs on some of its stream's tokens, which its data choose (mixture of depths)."""
        return any(point.operation.split(" ")[0] in PICKS for r in self.residuals for point, _ in r.gates)

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
    `proof` lists every identity that was checked. `stacks` are the chains of blocks, with the masks that govern them. `runs` says
    how often each module that is a block runs in a pass. `paths` are those of every run of a module in the pass that was read:
    how often its own code did each operation. What is not among them was never looked at. `inputs` are the names of the tensors
    that the model was given in it."""

    blocks: tuple[Block, ...]
    outer_norms: tuple[ModuleCall | NormPiece, ...] = ()
    proof: tuple[Identity, ...] = ()
    runs: tuple[tuple[str, int], ...] = ()
    stacks: tuple[Stack, ...] = ()
    paths: Paths = field(default_factory=dict, compare=False, repr=False)
    inputs: frozenset[str] = field(default=frozenset(), compare=False)

    def stack_of(self, block: int) -> int:
        """The number of the stack that the block with this number belongs to."""
        return next(i for i, stack in enumerate(self.stacks) if block in stack.blocks)

    @property
    def own_modules(self) -> frozenset[str]:
        """The names of the modules with a single block in their code. One with several may hold the weights of the whole model."""
        calls = Counter(block.module for block in self.blocks)
        return frozenset(call.name for call, blocks in calls.items() if blocks == 1)

    def unseen_outside(self, model: nn.Module) -> list[str]:
        """The names of modules outside the blocks that did not run when the model was read; of one in another the outer."""
        ran, blocks = {name for name, _ in self.paths}, {block.module.name for block in self.blocks}
        holding = {
            part for name in ran for part in _around(name)
        }  # a list of modules never runs, and what it holds may
        found: list[str] = []
        for name, _ in model.named_modules() if ran else ():
            if name not in ran | holding and not {name, *_around(name)} & {*blocks, *found}:
                found.append(name)
        return found

    @property
    def norm_placement(self) -> str:
        """`pre`, `post`, `sandwich`, `output` or `none`, with `, parallel` where attention and MLP share one addition."""
        placements = list(dict.fromkeys(b.placement + (", parallel" if b.is_parallel else "") for b in self.blocks))
        return " / ".join(placements)

    def describe(self) -> str:
        """One line a block, for error messages and the curious."""
        return "\n".join(
            f"{b.name}[{b.module.call}] {b.placement}: " + " + ".join(f"{p.kind} ({p.module})" for p in b.parts)
            for b in self.blocks
        )


def _around(name: str) -> list[str]:
    """The names of the modules around one."""
    return [name[:end] for end, letter in enumerate(name) if letter == "."]


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
            summands = [i for i, leaves in enumerate(node.leaves) if leaves]
            zero = [i for i in summands if not node.leaves[i] - gone]
            if len(zero) == len(summands):  # the sum itself is left out further on
                zero = zero[1:]
            if zero:
                handlers[node.point] = _leaving_out(zero)
    return handlers


def _leaving_out(gone: Collection[int]) -> Handler:
    def handler(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return left_of(function, args, kwargs, gone)

    return handler
