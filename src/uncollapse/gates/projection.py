"""PG-OP, the position-gated output projection: Y_i = sum_h g_h(i) O_{h,i} W_h, gates from the position alone.

A sum of heads in one channel space does not show which head wrote what: O -> O M, W_O -> M^-1 W_O does not change it, for any
invertible M. Gates that differ from position to position break that symmetry (Cirrincione, arXiv 2604.23681):

    g(i) = 2 sigmoid(W_g phi(i) + b_g),    phi(i) features of position i

This form is our reconstruction: only the abstract was at hand, not the article's body.
At W_g = b_g = 0 all gates are exactly 1. So the model starts unchanged, but the gradients already differ between heads.
`PositionGatedProjection` is a module for your own models. `install_gates` puts it around the output projection of every
attention that the anatomy proves, and `remove_gates` removes it. `gate_report` says how much of the symmetry the gates of a
live model have broken. A cross-attention is gated by the position of the decoder token, which receives.

When not to use it: to tell heads apart at a single position. One position gives one equation, with or without gates. Only
contents that recur at several positions can be told apart, up to the rank of the gates. Mixing *within* a head always survives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from uncollapse.anatomy.probing import full_precision
from uncollapse.anatomy.sharded_weights import head_shards
from uncollapse.errors import InputError, UnsupportedModel
from uncollapse.gates.position_features import Positions

if TYPE_CHECKING:
    from uncollapse.gates.token_positions import TokenPositions

LARGEST_OVERHEAD = 0.016  # of the projection's parameters where nobody asks for a width: the paper's "below 1.6 %"
Features = Literal["sinusoidal", "learned"]


class PositionGatedProjection(nn.Module):
    """An output projection whose heads pass through gates that depend on the token's position alone.

    projection: `nn.Linear`, transformers' `Conv1D`, or another module with `in_features` and `out_features`. It stays unchanged,
    and its weights keep their names in a state dict, which also has `gate.weight`, `gate.bias` and, for learned features, `table`.
    heads: the number of heads, each an equal run of the mixed channels.
    positions: `"sinusoidal"`, fixed features for any position; `"learned"`, a table of its own with `max_positions` rows; or the
    position table of the model, an `nn.Embedding`, which still belongs to the model and is not stored twice.
    position_width: features per position. Default: the most that keep `overhead` below 1.6 %, at most the width and at least 1.
    perturbation: standard deviation of the initial W_g and b_g, drawn with `seed`. With 0 all gates start at exactly 1, and the
    output equals that of the plain projection, bit for bit.

    The gates are computed in at least single precision, also under autocast and in half-precision models. They are rounded to
    the number format of the input before they multiply it.

    >>> gated = PositionGatedProjection(nn.Linear(128, 128), heads=2)
    >>> x = torch.randn(1, 5, 128)
    >>> torch.equal(gated(x), gated.projection(x)), gated.overhead < 0.016
    (True, True)

    Raises `InputError` if projection, heads and features do not fit together.
    """

    def __init__(
        self,
        projection: nn.Module,
        heads: int,
        *,
        position_width: int | None = None,
        positions: Features | nn.Embedding = "sinusoidal",
        max_positions: int = 512,
        perturbation: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        numbers = {"heads": heads, "position_width": position_width, "max_positions": max_positions, "seed": seed}
        for name, number in numbers.items():
            if not isinstance(number, int) and not (name == "position_width" and number is None):
                raise _unfit(f"a whole number as {name}", repr(number), "Pass an int.")
        if not -(2**63) <= seed < 2**63:
            raise _unfit("a seed of at most 64 bits", f"{seed}", "Pass a smaller number.")
        mixed, width = _widths(projection)
        shared = positions if isinstance(positions, nn.Embedding) else None
        rows = max_positions if positions == "learned" else 0
        if heads < 1 or mixed % heads:
            raise _unfit(f"mixed channels a multiple of heads = {heads}", f"{mixed}", "Pass the attention's own heads.")
        if shared is None and positions not in ("sinusoidal", "learned"):
            raise _unfit("positions 'sinusoidal', 'learned' or an nn.Embedding", repr(positions), "Check the spelling.")
        if shared is not None and position_width not in (None, shared.embedding_dim):
            known = f"{shared.embedding_dim}, the width of the table"
            raise _unfit(f"position_width {known}", f"{position_width}", "Leave it out.")
        if position_width is None:
            position_width = shared.embedding_dim if shared else _widest(_size(projection), width, heads, rows)
        if position_width < 1 or max_positions < 1 or not 0 <= perturbation < math.inf:
            got = f"{position_width}, {max_positions}, {perturbation}"
            raise _unfit("position_width and max_positions from 1, perturbation from 0", got, "Check the numbers.")
        self.heads, self.head_width, self.position_width = heads, mixed // heads, position_width
        self.projection = projection
        weight = next((p for p in projection.parameters() if p.is_floating_point() and p.device.type != "meta"), None)
        place = {} if weight is None else {"device": weight.device, "dtype": weight.dtype}
        self.gate: nn.Linear = nn.utils.skip_init(nn.Linear, position_width, heads, **place)  # draws nothing
        self.table: nn.Parameter | None = None
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.gate.parameters():
                parameter.copy_(perturbation * torch.randn(parameter.shape, generator=generator))
        if rows:  # of the mean square that sinusoids have
            table = math.sqrt(0.5) * torch.randn(rows, position_width, generator=generator)
            self.table = nn.Parameter(table.to(self.gate.weight))
        self._shared = (shared,)  # in a tuple: no part of this module, so not in the state dict a second time
        self.installed: Installed | None = None
        self.train(projection.training)
        # torch does not type these three calls of its own.
        self.register_state_dict_post_hook(_with_plain_names)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_inner_names)  # type: ignore[no-untyped-call]

    @property
    def weight(self) -> Any:
        """The projection's own weight: some models look at its dtype."""
        return self.projection.weight

    @property
    def bias(self) -> Any:
        return self.projection.bias

    @property
    def overhead(self) -> float:
        """Parameters of the gates, a table of their own included, as a share of those of the projection."""
        return sum(p.numel() for p in self._own_parameters()) / max(1, _size(self.projection))

    @property
    def max_positions(self) -> int | None:
        """How many positions have features; `None`: all."""
        table = self._shared[0]
        return len(self.table) if self.table is not None else table.num_embeddings - _offset(table) if table else None

    def gates(self, positions: Int[Tensor, "*batch token"]) -> Float[Tensor, "*batch token head"]:
        """The gates 2 sigmoid(W_g phi(i) + b_g) at the given positions: between 0 and 2, 1 where a head passes as it is."""
        return 2 * self._logits(Positions.of(positions)).sigmoid().expand(*positions.shape, self.heads)

    def forward(
        self, x: Float[Tensor, "*batch token mixed"], positions: Int[Tensor, "*batch token"] | None = None
    ) -> Float[Tensor, "*batch token width"]:
        """The projection of the gated heads. `positions` [token] or [batch, token] are integers from 0; without them, those of the
        running pass where `install_gates` put this module, else 0, 1, 2, ….

        Raises `InputError` where x and positions do not fit, `UnsupportedModel` where a pass does not tell positions.
        """
        mixed = self.heads * self.head_width
        shards, shard = (1, 0) if x.shape[-1:] == (mixed,) else head_shards(self.projection)
        if x.ndim < 2 or x.shape[-1] * shards != mixed or self.heads % shards:
            expected = f"x[..., token, mixed = {self.heads} heads x {self.head_width}]"
            raise _unfit(expected, f"{list(x.shape)}", "Pass the concatenated heads.", "forward")
        dtype = self.projection.weight.dtype if type(self.projection) is nn.Linear else x.dtype
        if dtype.is_floating_point and x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            names = [str(each).removeprefix("torch.") for each in (dtype, x.dtype)]
            raise _unfit(f"x in {names[0]}, as the projection", names[1], f"Pass x.to(torch.{names[0]}).", "forward")
        installed = self.installed
        axis = x.ndim - 2
        if positions is not None:
            found = self._checked(x, positions)
        elif installed is None:
            found = Positions.counted(0, x.shape[axis], x.device)
        else:
            axis = installed.token_axis if x.ndim == 3 else axis
            found = installed.now(x, axis, self.training)
        z = self._logits(found).to(x.device)
        if shards > 1:
            z = z.chunk(shards, -1)[shard]
        if z.ndim == 3:  # [batch, token, head]
            z = z.transpose(0, 1) if axis == 0 else z.view(z.shape[0], *(1,) * (x.ndim - 3), *z.shape[1:])
        elif axis == 0 and x.ndim == 3:
            z = z[:, None]
        else:
            z = z.view(*(1,) * (x.ndim - 2), *z.shape)
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or z.requires_grad)
        if not needs_gradient:
            return self.projection(_gated(x, z))
        return self.projection(_Gated.apply(x, z))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        kind = "sinusoidal" if self.max_positions is None else "learned" if self.table is not None else "the model's"
        return f"heads={self.heads}, position_width={self.position_width}, positions={kind}"

    def _own_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.gate.parameters()
        if self.table is not None:
            yield self.table

    def _checked(self, x: Tensor, positions: Tensor) -> Positions:
        fits = positions.ndim == 1 or (positions.ndim == 2 and x.ndim > 2 and positions.shape[0] in (1, x.shape[0]))
        whole = not (positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool)
        if not fits or positions.shape[-1] != x.shape[-2] or not whole or bool((positions < 0).any()):
            expected = f"integer positions from 0, [token = {x.shape[-2]}] or [batch, token]"
            got = f"{str(positions.dtype).removeprefix('torch.')}{list(positions.shape)}"
            raise _unfit(expected, f"{got} for x{list(x.shape)}", "Pass torch.arange(tokens).", "forward")
        return Positions.of(positions.to(x.device))

    def _logits(self, positions: Positions) -> Tensor:
        """W_g phi + b_g, [token, head] or [batch, token, head]."""
        W, b = self.gate.weight, self.gate.bias
        dtype = torch.promote_types(W.dtype, torch.float32)
        with full_precision(W):
            z = linear(self._features(positions, dtype).to(W.device), W.to(dtype), b.to(dtype))
        return z if positions.index is None else embedding(positions.index.to(z.device), z)

    def _features(self, positions: Positions, dtype: torch.dtype) -> Tensor:
        if self.max_positions is None:
            return positions.sinusoids(self.position_width, dtype)
        if len(positions.values) and int(positions.values.max()) >= self.max_positions:
            got = f"position {int(positions.values.max())}"
            raise _unfit(f"positions below {self.max_positions}", got, "Use positions='sinusoidal'.", "forward")
        shared = self._shared[0]
        table = self.table if shared is None else shared.weight
        assert table is not None
        rows = positions.values + (0 if shared is None else _offset(shared))
        return embedding(rows.to(table.device), table).to(dtype)


class _Gated(torch.autograd.Function):
    """y = x · 2σ(z), head by head. Keeps y, which the projection keeps anyway, and not x: since dg/dz = g (1 − g/2), the gradient
    of z is (1 − g/2) Σ_k dy·y, and needs neither x nor a division by a gate that may be closed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, z: Tensor) -> Tensor:
        return _gated(x, z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1], output)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        z, y = ctx.saved_tensors
        dx = _gated(dy, z) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        heads = (z.shape[-1], -1)
        # A product of rows and columns: dy·y, of the input's size, is never formed.
        sums = (dy.unflatten(-1, heads).unsqueeze(-2) @ y.unflatten(-1, heads).unsqueeze(-1))[..., 0, 0]
        shared = [axis for axis in range(z.ndim - 1) if z.shape[axis] == 1 != y.shape[axis]]
        sums = sums.sum(shared, keepdim=True, dtype=z.dtype) if shared else sums.to(z.dtype)
        return dx, sums * (1 - z.sigmoid())


def _gated(x: Tensor, z: Tensor) -> Tensor:
    """x times the gates of logits z [..., token, head], each over its head's channels."""
    g = (2 * z.sigmoid()).to(x)
    return (x.unflatten(-1, (z.shape[-1], -1)) * g.unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True)
class Installed:
    """Where `install_gates` put a gated projection: which blocks and kinds of attention it serves, in which stack, which axis of
    its input counts tokens (0 or 1), and who knows their positions."""

    positions: TokenPositions
    stack: str
    token_axis: int
    places: tuple[tuple[int, str], ...]

    def now(self, x: Tensor, axis: int, training: bool) -> Positions:
        if x.ndim != 3:
            raise UnsupportedModel(
                f"gates: expected x[batch, token, mixed] as when they were installed, got {list(x.shape)}. The model took "
                "a different path. Pass positions to the projection, or call remove_gates(model)."
            )
        return self.positions.now(
            self.stack, x.shape[1 - axis], x.shape[axis], x.device, training or torch.is_grad_enabled()
        )


def dense_projection(projection: nn.Module) -> Tensor:
    """W_O as [mixed, width], a view of the projection's own weight. Raises `InputError` where it has no dense one."""
    weight = getattr(projection, "weight", None)
    mixed, width = _widths(projection)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.device.type != "meta":
        if isinstance(projection, nn.Linear) and weight.shape == (width, mixed):
            return weight.detach().T
        if type(projection).__name__ == "Conv1D" and weight.shape == (mixed, width):
            return weight.detach()
    raise _unfit("an nn.Linear or Conv1D with a dense weight", type(projection).__name__, "It may be quantised.")


def _widths(projection: nn.Module) -> tuple[int, int]:
    """How many channels a projection reads and writes."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        mixed, width = (getattr(projection, name, None) for name in names)
        if isinstance(mixed, int) and isinstance(width, int):
            return mixed, width
    raise _unfit(
        "a projection with in_features and out_features", type(projection).__name__, "Pass nn.Linear or Conv1D."
    )


def _size(projection: nn.Module) -> int:
    return sum(p.numel() for p in projection.parameters())


def _widest(parameters: int, width: int, heads: int, rows: int) -> int:
    """The most features with (position_width + 1) heads + rows position_width below LARGEST_OVERHEAD of the parameters."""
    room = math.ceil((LARGEST_OVERHEAD * parameters - heads) / (heads + rows)) - 1
    return max(1, min(width, room))


def _offset(table: nn.Embedding) -> int:
    """The row of position 0 in a model's own table: OPT and BART begin behind two rows, RoBERTa behind its padding index."""
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _with_plain_names(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """In a state dict, the projection's weights keep the names they have without gates."""
    inner = f"{prefix}projection."
    for name in [n for n in state if n.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def _with_inner_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Back from there when it is loaded."""
    assert isinstance(module, PositionGatedProjection)
    for name in module.projection.state_dict():
        if prefix + name in state:
            state[f"{prefix}projection.{name}"] = state.pop(prefix + name)


def _unfit(expected: str, got: str, advice: str, function: str = "PositionGatedProjection") -> InputError:
    return InputError(f"{function}: expected {expected}, got {got}. {advice}")
