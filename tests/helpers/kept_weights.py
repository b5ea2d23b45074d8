"""How often weights that accelerate keeps elsewhere are read."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from accelerate.utils import offload


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts readings from now on, by the name of the weight: of a model in memory, or of one on disk."""
    found: Counter[str] = Counter()
    from_memory, from_disk = offload.PrefixedDataset.__getitem__, offload.OffloadedWeightsLoader.__getitem__

    def of_module(self: Any, key: str) -> Any:
        if not isinstance(self.dataset, offload.OffloadedWeightsLoader):  # else it is counted there
            found[self.prefix + key] += 1
        return from_memory(self, key)

    def of_checkpoint(self: Any, key: str) -> Any:
        found[key] += 1
        return from_disk(self, key)

    monkeypatch.setattr(offload.PrefixedDataset, "__getitem__", of_module)
    monkeypatch.setattr(offload.OffloadedWeightsLoader, "__getitem__", of_checkpoint)
    return found
