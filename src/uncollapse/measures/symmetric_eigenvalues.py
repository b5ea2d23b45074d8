"""Eigenvalues of many symmetric matrices, shared out among the threads that torch may use.

LAPACK takes one matrix after another in one thread, while the model's products use all of them. So does this.

When not to use it: for one matrix. LAPACK and its BLAS are left to share that out themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from uncollapse.measures.shared_out import shared_out

LEAST_WORK = 2e6  # sum of cubes of sides below which handing them over costs more than it saves


def eigenvalues(batches: Sequence[Tensor]) -> list[Tensor]:
    """In ascending order, of each batch of symmetric matrices [matrix, side, side]. No gradients flow back.

    >>> eigenvalues([torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])])
    [tensor([[1., 2.]])]
    """
    given = [batch.detach() for batch in batches]
    threads = torch.get_num_threads()
    work = sum(len(batch) * batch.shape[-1] ** 3 for batch in given if batch.device.type == "cpu")
    if threads == 1 or work < LEAST_WORK:
        return [torch.linalg.eigvalsh(batch) for batch in given]
    # What is left over when a batch is divided goes to another thread each time: many batches hold a single matrix.
    parts = [batch.tensor_split(threads) for batch in given]

    def share(number: int) -> list[Tensor]:
        return [torch.linalg.eigvalsh(part[(number + place) % threads]) for place, part in enumerate(parts)]

    done = shared_out([functools.partial(share, number) for number in range(threads)])
    return [
        torch.cat([done[(number - place) % threads][place] for number in range(threads)]) for place in range(len(given))
    ]
