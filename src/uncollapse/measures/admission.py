"""What may come into a measure: dense tensors of ordinary numbers, on one device. And the size at which it is computed with.

A measure is a formula on numbers. Sparse, nested and quantised tensors, those on `meta`, complex numbers and eight-bit formats
have no such numbers in place; they are refused by name before torch says something about its insides.

Squares of very large or small numbers leave the range of their format. `at_size_one` brings a tensor there by a power of two,
which rounds nothing.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from uncollapse.errors import InputError, UncollapseError

P = ParamSpec("P")
R = TypeVar("R")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SCALARS = frozenset({"eps", "tol", "scale", "softcap"})  # numbers that may come as a tensor without axes


def admitting(function: Callable[P, R]) -> Callable[P, R]:
    """Refuse what no measure takes, under the name of `function`: `InputError` for anything but dense tensors of ordinary numbers
    on one device where it wants tensors, and for tensors that torch finds not to fit together."""
    parameters = inspect.signature(function).parameters
    names = tuple(parameters)
    required = {n for n, p in parameters.items() if "Tensor" in str(p.annotation) and "Any" not in str(p.annotation)}
    optional = {n for n in required if "None" in str(parameters[n].annotation)}
    others = {n for n in required if "WriteSpaces" in str(parameters[n].annotation)}

    @functools.wraps(function)
    def admitted(*args: P.args, **kwargs: P.kwargs) -> R:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        tensors = {n: v for n, v in given.items() if isinstance(v, Tensor)}
        for name, value in given.items():
            if name in required and not isinstance(value, Tensor) and not (name in optional and value is None):
                if name in others and not isinstance(value, (list, tuple, int, float, str)):
                    continue
                raise InputError(
                    f"{function.__name__}: expected a tensor as {name}, got {type(value).__name__}. "
                    "It may be an array or a list. Pass torch.as_tensor(...) of it."
                )
        for name, tensor in tensors.items():
            require_plain(function.__name__, name, tensor)
        devices = {str(t.device) for t in tensors.values() if t.ndim}
        if len(devices) > 1:
            raise InputError(
                f"{function.__name__}: expected tensors on one device, got {' and '.join(sorted(devices))}. "
                "A mask may have stayed where it was made. Move it with .to(x.device)."
            )
        try:
            return function(*args, **kwargs)
        except (UncollapseError, torch.OutOfMemoryError):
            raise
        # What torch raises where shapes do not fit is any of these; its own words say more than ours could.
        except (RuntimeError, IndexError, ValueError, TypeError, ArithmeticError) as error:
            shown = ", ".join(f"{n} {described(t)}" for n, t in tensors.items()) or "no tensor"
            reason = str(error).strip().partition("\n")[0][:160].rstrip(".")
            raise InputError(
                f"{function.__name__}: expected arguments that fit together, got {shown}: {reason}. "
                f"See help({function.__module__}.{function.__name__}) for their axes."
            ) from error

    return admitted


def require_plain(function: str, name: str, tensor: Tensor) -> None:
    """Raise `InputError` unless `tensor` is dense, is not on `meta`, and holds ordinary numbers."""
    trouble = None
    if tensor.is_nested:
        trouble = ("a nested tensor", "Its sequences differ in length", "Pad it, and pass a mask")
    elif tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
        trouble = (f"a tensor with layout {kind}", "It is stored sparsely", f"Pass {name}.to_dense()")
    elif tensor.is_meta:
        trouble = ("a tensor on meta", "The model may be offloaded, or was never loaded", "Pass one that holds numbers")
    elif tensor.is_quantized or (tensor.is_floating_point() and tensor.dtype not in FLOATS):
        trouble = (described(tensor), "Nothing can be computed in this format", f"Pass {name}.float()")
    elif tensor.is_complex():
        trouble = (
            described(tensor),
            "It may come out of a Fourier transform",
            "Pass its real part, or its absolute value",
        )
    elif tensor.ndim == 0 and name not in _SCALARS:
        trouble = (described(tensor), "It has no axes", "Pass the tensor that it was taken from")
    if trouble is not None:
        got, cause, call = trouble
        raise InputError(f"{function}: expected a dense tensor of real numbers as {name}, got {got}. {cause}. {call}.")


def described(tensor: Tensor) -> str:
    """Format and axes, as in `float32[2, 3]`."""
    axes = "[...]" if tensor.is_nested else str(list(tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')}{axes}"


def at_size_one(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`x` times a power of two that brings its largest number along `dims` to between 1/2 and 1, and the exponent e of the
    size it had, with these axes kept: x = result 2^e. Zeros, and what is not finite, stay as they are: e = 0.

    >>> scaled, exponent = at_size_one(torch.tensor([3e300, 1e300], dtype=torch.float64), (0,))
    >>> exponent.item(), round(scaled[0].item() / scaled[1].item(), 9)
    (999, 3.0)
    """
    largest = x.detach().abs().amax(dims, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0)
    exponent = torch.frexp(largest.double()).exponent
    return times_power_of_two(x, -exponent), exponent


def times_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """x 2^exponent; in two steps, since 2^exponent itself may lie outside the range."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    two = torch.tensor(2.0, dtype=torch.float64, device=x.device)
    return (x * torch.pow(two, half).to(x.dtype)) * torch.pow(two, exponent - half).to(x.dtype)


def is_ordinary(x: Tensor, exponent: float = 100) -> bool:
    """Whether squares and sums of the numbers of `x` stay within the range of float32's exponents, give or take."""
    if not x.numel():
        return True
    x = x.detach()
    largest = max(float(x.amax()), -float(x.amin()))  # two readings, and nothing written; NaN stays NaN
    return math.isfinite(largest) and (largest == 0 or abs(math.log2(largest)) < exponent)
