"""What an output projection does to the head outputs that it is given: its matrix, and the energy of each head."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from uncollapse.anatomy.block_alone import blocks_alone
from uncollapse.anatomy.examples import piece_of
from uncollapse.anatomy.interception import Handler, Point
from uncollapse.anatomy.operands import UnreadableError
from uncollapse.anatomy.output_maps import gate_noted, gated, product_map, rounding
from uncollapse.anatomy.probing import measuring
from uncollapse.anatomy.stacks import real_tokens
from uncollapse.anatomy.streams import Action
from uncollapse.anatomy.torch_calls import tensors_in
from uncollapse.anatomy.vocabulary import Anatomy, Gate, Part, Place
from uncollapse.errors import UncollapseError
from uncollapse.measures import heads
from uncollapse.probe.attention import AttentionStatistics
from uncollapse.probe.clouds import Clouds
from uncollapse.probe.observing import Look, looking, unasked
from uncollapse.probe.sizes import norms, single
from uncollapse.restoring import restoring

Digest = Callable[[AttentionStatistics], dict[str, Any]]
SCALE = 256.0
SOMETHING_BETWEEN = "something acts between the attention and its output projection"
LEAST_APART = 0.1  # share of the heads' energy that must be centred for a difference to say it
MOST_ROUNDING = 1e-3  # of the heads' energy may be rounding: shares are then good to a percent


@dataclass
class _WholeMap:
    """An attention without an output projection of its own, the bias of the map from its mixed values to what it writes, and what
    the gates on these were in this pass."""

    index: int
    part: Part
    bias: Tensor | None = None
    factors: dict[Point, Tensor | None] = field(default_factory=dict)


class Projections:
    """Meets the output projection of each attention sublayer; an `Observer`. Fills in `matrix`, `energy` and `tokens` of their
    statistics. `sublayers`: each attention part with its statistics. `mixed` takes what its heads mixed. `contributed` is told the
    number of the sublayer, the size of what each head writes [sequence, head, token], and which tokens are real. `digest` makes
    figures of a matrix that does not stay, see `capture`."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        sublayers: Sequence[tuple[Part, AttentionStatistics]],
        clouds: Clouds,
        is_own: Callable[[], bool],
        *,
        contributed: Callable[[int, Tensor, Tensor | None], None] | None = None,
        digest: Digest | None = None,
    ) -> None:
        self.model, self.anatomy, self.clouds = model, anatomy, clouds
        self._is_own, self._contributed, self._digest = is_own, contributed, digest
        self._statistics = [statistics for _, statistics in sublayers]
        self.streams: list[tuple[Place, Action]] = []
        self._modules: dict[str, dict[int, int]] = {}  # by name and run: the sublayer whose projection it is
        self._runs: dict[str, int] = {}
        self._mixed: dict[int, Tensor] = {}  # by sublayer: what the heads mixed, until the projection comes
        self._matrices: dict[str, Tensor] = {}
        self._passing: set[str] = set()  # of these the matrices do not stay
        self._met: dict[str, set[int]] = {}  # and these are the sublayers that have read them
        self._grams: dict[int, Tensor] = {}  # by sublayer, see `heads.write_grams`
        self._roots: dict[int, Tensor] = {}  # by sublayer: L with L L^T the Gram matrix, for each head
        self._whole_maps: list[_WholeMap] = []
        self._have_whole_maps = False
        self._first: Projections | None = None  # who has read the weights before this one, see `read_with`
        # Of a sharded model the whole weights exist only while a block runs, and their memory is freed under whoever kept a view.
        self._lasting = {id(p) for p in model.parameters()}
        looks: dict[Point, list[Look]] = {}
        for index, (part, statistics) in enumerate(sublayers):
            projection = statistics.call.projection
            if isinstance(projection, Point):
                looks.setdefault(projection, []).append(functools.partial(self._meet_product, index))
            elif projection is not None:
                self._modules.setdefault(projection.name, {})[projection.call] = index
            elif part.written is not None and not part.no_output_map:
                whole = _WholeMap(index, part)
                self._whole_maps.append(whole)
                if all(each.unreadable is None for each in part.attention):
                    for gate in part.gates:
                        looks.setdefault(gate.point, []).append(functools.partial(_note_gate, whole, gate))
                    looks.setdefault(part.written, []).append(functools.partial(self._meet_written, whole))
                if part.gates:
                    statistics.reasons["gauge_dimension"] = SOMETHING_BETWEEN
                elif len(part.attention) > 1 and not part.attention[0].shares_queries:
                    statistics.reasons["gauge_dimension"] = "several products mix values, which may be the same ones"
            if part.no_output_map or (projection is None and part.written is None):
                reason = part.no_output_map or "no output projection follows this attention"
                statistics.reasons |= {"matrix": reason, "energy_share": reason}
        self.handlers: dict[Point, Handler] = {p: looking(several, is_own) for p, several in looks.items()}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks for the passes inside. Install them inside `intercepted`: operations of theirs must not count as the model's."""
        with restoring() as changes:
            for name in self._modules:
                module, enter = self.model.get_submodule(name), functools.partial(self._enter, name)
                changes.hook(module, "forward_pre", enter, with_kwargs=True)
            yield

    def begin(self, batch: Mapping[str, Any]) -> None:
        self._runs.clear()
        self._mixed.clear()
        for whole in self._whole_maps:
            whole.factors.clear()
        if self._whole_maps and not self._have_whole_maps:
            if self._first is None:
                self._find_whole_maps(batch)
            else:
                self._have_whole_maps = True
                for own, known in zip(self._whole_maps, self._first._whole_maps, strict=True):
                    own.bias = known.bias

    def read_with(self, first: Projections) -> None:
        """Read no matrix anew that another observer of the same sublayers, which sees each batch before this one, has read."""
        self._matrices, self._passing, self._met = first._matrices, first._passing, first._met
        self._grams, self._roots, self._first = first._grams, first._roots, first

    def let_go(self) -> None:
        self.handlers.clear()
        self._first = None

    def mixed(self, index: int, found: Tensor | None) -> None:
        """What the heads of an attention mixed [sequence, head, token, width], its output projection still to come; None where it
        is not known."""
        if found is None:
            self._mixed.pop(index, None)
        else:
            self._mixed[index] = found

    # The matrix ---------------------------------------------------------------------------------------------------
    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_own():
            return
        run = self._runs.get(name, 0)
        self._runs[name] = run + 1
        index = self._modules[name].get(run)
        if index is not None:
            given = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
            with unasked([given, *module.parameters()]), measuring(given):
                self._meet_module(index, name, module, given)

    def _meet_module(self, index: int, name: str, module: nn.Module, given: Tensor) -> None:
        statistics = self._statistics[index]
        if name not in self._matrices:
            try:
                matrix = projection_matrix(module, given)
                if any(id(p) not in self._lasting or p.is_meta for p in module.parameters()):
                    self._passing.add(name)
                    matrix = matrix if self._digest is not None else matrix.clone()
                self._matrices[name] = matrix
            except UncollapseError as error:
                statistics.reasons |= {"matrix": str(error), "energy_share": str(error)}
                return
        matrix = side_by_side(self._matrices[name], statistics.features, 0)
        self._measure_energy(index, matrix, given)
        if self._digest is None or name not in self._passing:
            statistics.matrix = matrix
        elif statistics.figures is None:
            statistics.matrix = matrix
            statistics.figures = self._digest(statistics)
            statistics.matrix = None
            self._met.setdefault(name, set()).add(index)
            if self._met[name] == set(self._modules[name].values()):  # nobody else is to read it
                self._matrices[name] = matrix.new_empty(()).expand(matrix.shape)

    def _meet_product(
        self, index: int, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """An output projection written in the attention's own code: its weight is an operand."""
        statistics, found = self._statistics[index], product_map(function, args, kwargs)
        if found is not None and len(found.matrix) == statistics.call.heads * statistics.call.head_width:
            lasts = any(id(t) in self._lasting for t in tensors_in([args, kwargs]))
            matrix = found.matrix if lasts else found.matrix.clone()
            statistics.matrix = side_by_side(matrix, statistics.features, 0)
            self._measure_energy(index, statistics.matrix, found.given)
        else:
            reason = "the output projection is no linear map of the concatenated heads"
            statistics.reasons |= {"matrix": reason, "energy_share": reason}

    def _find_whole_maps(self, batch: Mapping[str, Any]) -> None:
        """The maps from mixed values to what is written, from the weights as they are, on a few tokens of this batch."""
        self._have_whole_maps = True
        with torch.random.fork_rng(devices=[]):
            piece = piece_of(self.model, batch, real_tokens(self.anatomy, batch))
            numbers = {self._statistics[each.index].block for each in self._whole_maps}
            alone = blocks_alone(self.model, piece, self.anatomy, numbers)
            for each in self._whole_maps:
                statistics = self._statistics[each.index]
                block = alone[statistics.block]
                try:
                    number = next(i for i, part in enumerate(block.block.parts) if part is each.part)
                    with measuring(block.stream):
                        statistics.matrix, each.bias = block.output_map(number)
                except UncollapseError as error:
                    statistics.reasons |= {"matrix": str(error), "energy_share": str(error)}

    # The energy ---------------------------------------------------------------------------------------------------
    def _meet_written(
        self, each: _WholeMap, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """What the heads of an attention write together: the energy of each, where the map that was found gives this again."""
        mixed = self._mixed.pop(each.index, None)
        statistics = self._statistics[each.index]
        matrix = statistics.matrix
        if "energy_share" in statistics.reasons or matrix is None or each.bias is None:
            return
        found = self.clouds.tokens_of(statistics.block, next(tensors_in(output)), "what its heads write")
        if mixed is None or found is None or mixed.shape[0::2] != found[0].shape[:2]:
            statistics.reasons["energy_share"] = (
                "the mixed values could not be laid beside the tokens that they are written to"
            )
            return
        try:
            mixed = gated(mixed, each.part, each.factors)
        except UnreadableError as error:
            statistics.reasons["energy_share"] = str(error)
            return
        cloud, mask = mixed.transpose(1, 2).flatten(2), found[1]
        if not bears_out(cloud, matrix, each.bias, found[0], mask):
            reason = "on this batch its heads do not write what the map found on the example says"
            statistics.reasons |= {"matrix": reason, "energy_share": reason}
            statistics.matrix = None
            return
        self._add_energy(each.index, matrix, cloud, mask)

    def _measure_energy(self, index: int, matrix: Tensor, read: Tensor) -> None:
        """The energy of each head's centred contribution. `read` is what the projection reads."""
        statistics, mixed = self._statistics[index], self._mixed.pop(index, None)
        call = statistics.call
        if "energy_share" in statistics.reasons:
            return
        if read.shape[-1] != call.heads * call.head_width:
            statistics.reasons["energy_share"] = "the output projection's input is not the concatenated heads"
            return
        read = side_by_side(read, statistics.features, -1)
        cloud, ends = projected_cloud(read, mixed, self.clouds.batch_size), None
        if cloud is None:
            laid = self.clouds.tokens_of(statistics.block, read, "what its output projection reads")
            cloud, ends = (None, None) if laid is None else laid
            if self.clouds.paddings[self.anatomy.stack_of(statistics.block)].segments is None:
                ends = None
        if cloud is not None and ends is not None and mixed is not None and mixed.shape[0::2] == ends.shape:
            # Sequences of several lengths that lie end to end: row by row.
            read, mixed = cloud[ends], mixed.transpose(1, 2)[ends].transpose(0, 1).unsqueeze(0)
        is_first = not statistics.tokens.count
        if is_first and mixed is not None and not holds(read, mixed):
            statistics.reasons["gauge_dimension"] = SOMETHING_BETWEEN
        if cloud is None:
            statistics.reasons["energy_share"] = "the tokens of the output projection's input cannot be told apart"
            return
        stack = self.anatomy.stack_of(statistics.block)
        mask = self.clouds.mask(stack, cloud.shape[1], f"the output projection of block {statistics.block}")
        if mask is not None and mask.shape[0] != cloud.shape[0]:
            mask = None
        self._add_energy(index, matrix, cloud, mask if ends is None else ends)

    def _add_energy(self, index: int, matrix: Tensor, cloud: Tensor, mask: Tensor | None) -> None:
        statistics = self._statistics[index]
        lengths = torch.full(cloud.shape[:1], cloud.shape[1]) if mask is None else mask.sum(-1)
        statistics.tokens = statistics.tokens.add(lengths)
        count = statistics.call.heads
        if index not in self._grams:
            self._grams[index] = heads.write_grams(matrix, count)
            self._roots[index] = roots(self._grams[index])
        sizes = written_sizes(cloud, self._roots[index])
        if self._contributed is not None:
            self._contributed(index, sizes, mask)
        energy = centred_energy(cloud, self._roots[index], sizes, mask)
        if energy is None:
            energy = heads.contribution_energy(cloud, matrix, count, mask, grams=self._grams[index])
        rows = self._grams[index].diagonal(dim1=-2, dim2=-1).flatten()  # the matrix itself may be gone by now
        if is_rounding(cloud, rows, energy, mask):
            kind = str(cloud.dtype).removeprefix("torch.")
            statistics.reasons["energy_share"] = (
                f"what its heads write differs between tokens by little more than {kind} rounds off"
            )
            return
        statistics.energy = statistics.energy.add((energy / energy.sum(-1, keepdim=True)).double())


def roots(grams: Tensor) -> Tensor:
    """L [head, feature, direction] with L L^T = W_h W_h^T: what a head writes is as large as what it mixed times L."""
    root, info = torch.linalg.cholesky_ex(grams)
    if bool((info == 0).all()):
        return root
    if not bool(grams.isfinite().all()):
        return torch.full_like(grams, math.nan)
    values, vectors = torch.linalg.eigh(grams)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)


def written_sizes(cloud: Tensor, root: Tensor) -> Tensor:
    """The size of what each head writes for each token, [sequence, head, token] in float64, from what the projection reads
    [sequence, token, mixed]."""
    sequences, tokens = cloud.shape[:2]
    by_head = single(cloud).reshape(sequences * tokens, len(root), -1).transpose(0, 1)
    sizes = norms(torch.bmm(by_head, root.to(by_head)))
    return sizes.unflatten(1, (sequences, tokens)).transpose(0, 1)


def centred_energy(cloud: Tensor, root: Tensor, sizes: Tensor, mask: Tensor | None) -> Tensor | None:
    """`heads.contribution_energy` [sequence, head] from the sizes [sequence, head, token] of what the heads write: the sum of their
    squares less that of the mean, n times. None where this difference has lost digits."""
    x = single(cloud)
    if mask is None:
        count = torch.tensor(float(x.shape[1]), dtype=torch.float64, device=x.device)
        total, mean = sizes.square().sum(-1), x.mean(1, dtype=torch.float64)
    else:
        real = mask.to(x.device)
        count = real.sum(-1, keepdim=True).double()
        total = sizes.where(real[:, None], 0).square().sum(-1)
        kept = x if bool(sizes.isfinite().all()) else torch.where(real.unsqueeze(-1), x, 0)  # whatever padding holds
        mean = (real.to(x).unsqueeze(-2) @ kept).squeeze(-2).double() / count
    common = torch.einsum("shf,hfd->shd", mean.unflatten(-1, (len(root), -1)), root.to(x).double())
    energy = total - count * common.square().sum(-1)
    return energy if bool((energy > LEAST_APART * total).all()) else None


def _note_gate(
    whole: _WholeMap,
    gate: Gate,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> None:
    whole.factors[gate.point] = gate_noted(gate, args, kwargs, output)


def projected_cloud(mixed: Tensor, heads_output: Tensor | None, batch_size: int) -> Tensor | None:
    """What the output projection reads as [sequence, token, mixed]. Batch-first as it stands; otherwise, and where there are as
    many tokens as sequences, the order of its rows is taken from the attention's own output [sequence, head, token, head width],
    which must be found in it. None where that does not tell it."""
    if mixed.ndim == 3 and mixed.shape[0] == batch_size != mixed.shape[1]:
        return mixed
    if heads_output is not None:
        known = heads_output.transpose(1, 2).flatten(2)  # [sequence, token, mixed]
        if mixed.numel() == known.numel():
            sequences, tokens = known.shape[:2]
            if torch.equal(mixed.reshape(known.shape), known):
                return mixed.reshape(known.shape)
            first = mixed.reshape(tokens, sequences, -1).transpose(0, 1)
            if torch.equal(first, known):
                return first
    return None


def is_rounding(mixed: Tensor, rows: Tensor, energy: Tensor, mask: Tensor | None) -> bool:
    """Whether more than `MOST_ROUNDING` of the heads' energy is rounding: see `rounding_share`. Mostly a bound on it will do, as if
    every feature wrote as much as the strongest does and padding counted."""
    size = torch.linalg.vector_norm(single(mixed), dim=(-2, -1)).double()
    most = rows.amax().double().sqrt() * torch.finfo(mixed.dtype).eps
    if bool(((size * most).square() / 24 <= MOST_ROUNDING * energy.double().sum(-1)).all()):
        return False
    return rounding_share(mixed, rows, energy, mask) > MOST_ROUNDING


def rounding_share(mixed: Tensor, rows: Tensor, energy: Tensor, mask: Tensor | None) -> float:
    """The part of the heads' energy [sequence, head] that is only the rounding of what they mixed, `mixed` [sequence, token,
    feature], in the worst sequence. `rows` are the squared sizes of the matrix's rows. Every feature is off by up to half a unit
    in its last place, eps^2/24 of its square on average."""
    squares = mixed.double().square()
    if mask is not None:
        squares = squares.where(mask[..., None].to(squares.device), 0)
    rounding = (squares.sum(-2) @ rows.double()) * torch.finfo(mixed.dtype).eps ** 2 / 24
    shares = (rounding / energy.double().sum(-1)).nan_to_num(0.0, 0.0, 0.0)
    return float(shares.max()) if shares.numel() else 0.0


def holds(mixed: Tensor, heads_output: Tensor) -> bool:
    """Whether what the projection reads is the attention's own output, whatever the order of its axes. NaN says nothing."""
    if mixed.numel() != heads_output.numel():
        return False
    found = (heads_output.permute(order) for order in ((0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 2, 3)))
    equal = any(torch.equal(mixed.flatten(), each.flatten().to(mixed.dtype)) for each in found)
    return equal or not bool(mixed.isfinite().all())


def projection_matrix(module: nn.Module, given: Tensor) -> Tensor:
    """W_O of `projection_map`, which raises what it does."""
    return projection_map(module, given)[0]


def projection_map(module: nn.Module, given: Tensor) -> tuple[Tensor, Tensor]:
    """W_O as [mixed, width], rows the concatenated heads, and the bias [width], zeros where there is none: of a plain linear
    map its parameters, else what the module makes of the unit vectors (adapters, quantised and offloaded weights: whatever it
    is, it should be affine). `given` is what it reads.

    Raises `UncollapseError` if the module is not affine or cannot be run on its own.
    """
    weight = getattr(module, "weight", None)
    own_forward = "forward" in vars(module)  # put on the instance by accelerate and others
    plain = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    if isinstance(weight, Tensor) and type(weight.data) is not Tensor:  # quantised weights are tensors of another class
        weight = None
    if plain and isinstance(weight, Tensor) and weight.is_floating_point() and not (own_forward or weight.is_meta):
        matrix = weight.detach().T if type(module) is nn.Linear else weight.detach()
        bias = getattr(module, "bias", None)
        return matrix, matrix.new_zeros(matrix.shape[1]) if bias is None else bias.detach()
    mixed = given.shape[-1]
    kept = [t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    dtype = (
        given.dtype if given.dtype in kept or not kept else kept[0]
    )  # under autocast the input is not in the weights'
    unit = torch.eye(mixed, device=given.device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    check = torch.randn(1, mixed, generator=generator).to(unit)
    # Large unit vectors, a power of two: f(s e) - f(0) then loses no digits of the weights to the bias.
    rows = torch.cat([SCALE * unit, torch.zeros_like(check), check])
    try:
        with torch.no_grad():  # `forward`: no hook on this module, ours nor the user's, should meet the unit vectors
            image = module.forward(rows.reshape(*(1,) * (given.ndim - 2), *rows.shape)).reshape(len(rows), -1)
    except Exception as error:  # a module of the user's may raise anything
        raise UncollapseError("the output projection cannot be run on its own") from error
    zero = image[mixed]
    matrix, got = (image[:mixed] - zero) / SCALE, image[mixed + 1] - zero
    expected = check[0].to(matrix.dtype) @ matrix
    # Activations may be quantised (below 1 %), and beside a large bias half precision rounds; a nonlinearity is off by more.
    allowed = 0.1 * expected.abs().max() + 4 * torch.finfo(image.dtype).eps * zero.abs().max()
    if bool(image.isfinite().all()) and not bool((got - expected).abs().max() <= allowed):
        raise UncollapseError("the output projection is not an affine map")
    return matrix, zero


def side_by_side(tensor: Tensor, features: Sequence[int], axis: int) -> Tensor:
    """`tensor` with the features along an axis in the order of their heads. `features`: the head of each; empty where they are."""
    if not features:
        return tensor
    order = torch.tensor(features, device=tensor.device).argsort(stable=True)
    return tensor.index_select(axis, order)


def bears_out(cloud: Tensor, matrix: Tensor, bias: Tensor, written: Tensor, mask: Tensor | None) -> bool:
    """Whether `cloud` [sequence, token, mixed] times the matrix, plus the bias, is what was written [sequence, token, width], to
    rounding, at a few real tokens of every sequence. What is not finite says nothing."""
    tokens = cloud.shape[1]
    some = sorted({0, tokens // 2, tokens - 1})
    rows, got = cloud[:, some].flatten(0, 1), written[:, some].flatten(0, 1)
    if mask is not None:
        real = mask[:, some].flatten().to(rows.device)
        rows, got = rows[real], got[real]
    again = rows.double() @ matrix.double() + bias.double()
    seen = again.isfinite() & got.isfinite()
    if not bool(seen.any()):
        return True
    eps = max(torch.finfo(t.dtype).eps for t in (written, matrix))
    gap = (again - got.double()).abs().where(seen, 0).max()
    rows, finite = rows.nan_to_num(0, 0, 0), matrix.nan_to_num(0, 0, 0)
    return bool(
        gap <= 4 * rounding(rows, finite, bias.nan_to_num(0, 0, 0)) + 16 * eps * got.double().abs().where(seen, 0).max()
    )
