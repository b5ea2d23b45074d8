"""uncollapse: diagnose, explain and undo representational collapse in Transformers.

    import uncollapse as uc
    uc.diagnose(model, texts, tokenizer=tokenizer).show()

Everything below is loaded on first use: importing the package costs nothing, so that `uncollapse --help` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Ablation": "ablation",
    "Diagnosis": "diagnosis",
    "InputError": "errors",
    "Layout": "anatomy",
    "UncollapseError": "errors",
    "UnsupportedModel": "errors",
    "ablate": "ablation",
    "diagnose": "diagnosis",
    "verify": "claims",
    "without": "interventions",
}
_MODULES = ("geometry", "heads", "mixing")

__all__ = [
    "Ablation",
    "Diagnosis",
    "InputError",
    "Layout",
    "UncollapseError",
    "UnsupportedModel",
    "__version__",
    "ablate",
    "diagnose",
    "geometry",
    "heads",
    "mixing",
    "verify",
    "without",
]

if TYPE_CHECKING:
    from uncollapse import geometry, heads, mixing
    from uncollapse.ablation import Ablation, ablate
    from uncollapse.anatomy import Layout
    from uncollapse.claims import verify
    from uncollapse.diagnosis import Diagnosis, diagnose
    from uncollapse.errors import InputError, UncollapseError, UnsupportedModel
    from uncollapse.interventions import without


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"uncollapse.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"uncollapse.{name}")
    else:
        raise AttributeError(f"module 'uncollapse' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
