"""The products of a matrix' columns with each other.

When not to use it: for narrow matrices, where the ordinary product costs the same, or where both triangles differ.
"""

from __future__ import annotations

from torch import Tensor

_BLOCK = 96  # narrower products are not faster by the half that they leave out


def column_gram(x: Tensor) -> Tensor:
    """xᵀ x [..., column, column] of x [..., row, column]. The two triangles are equal, so of a wide one only what stands on the
    diagonal and on one side of it is computed.

    >>> import torch
    >>> column_gram(torch.tensor([[1.0, 2.0]]))
    tensor([[1., 2.],
            [2., 4.]])
    """
    width = x.shape[-1]
    if width <= 2 * _BLOCK:
        return x.mT @ x
    gram = x.new_empty(*x.shape[:-2], width, width)
    half = width // 2
    left, right = x[..., :half], x[..., half:]
    gram[..., :half, :half], gram[..., half:, half:] = column_gram(left), column_gram(right)
    gram[..., :half, half:] = left.mT @ right
    gram[..., half:, :half] = gram[..., :half, half:].mT
    return gram
