"""What an output projection does to the head outputs that it is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from uncollapse.anatomy.output_maps import rounding
from uncollapse.errors import UncollapseError

SCALE = 256.0
MOST_ROUNDING = 1e-3  # of the heads' energy may be rounding: shares are then good to a percent


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


def rounding_share(mixed: Tensor, matrix: Tensor, energy: Tensor, mask: Tensor | None) -> float:
    """The part of the heads' energy [sequence, head] that is only the rounding of what they mixed, `mixed` [sequence, token,
    feature], in the worst sequence: every feature is off by up to half a unit in its last place, eps^2/24 of its square on
    average."""
    squares = mixed.double().square()
    if mask is not None:
        squares = squares.where(mask[..., None].to(squares.device), 0)
    rounding = (squares.sum(-2) @ matrix.double().square().sum(-1)) * torch.finfo(mixed.dtype).eps ** 2 / 24
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
    except Exception as error:
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
