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
    "HeadContributions": "contributions",
    "Identifiability": "identifiability",
    "InputError": "errors",
    "Layout": "anatomy",
    "PositionGatedProjection": "gating",
    "Symmetries": "equivariance",
    "UncollapseError": "errors",
    "UnsupportedModel": "errors",
    "ablate": "ablation",
    "diagnose": "diagnosis",
    "head_contributions": "contributions",
    "identify": "identifiability",
    "install_gates": "gate_installation",
    "remove_gates": "gate_installation",
    "symmetries": "equivariance",
    "verify": "claims",
    "without": "interventions",
}
_MODULES = ("geometry", "heads", "mixing")

__all__ = [
    "Ablation",
    "Diagnosis",
    "HeadContributions",
    "Identifiability",
    "InputError",
    "Layout",
    "PositionGatedProjection",
    "Symmetries",
    "UncollapseError",
    "UnsupportedModel",
    "__version__",
    "ablate",
    "diagnose",
    "geometry",
    "head_contributions",
    "heads",
    "identify",
    "install_gates",
    "mixing",
    "remove_gates",
    "symmetries",
    "verify",
    "without",
]

if TYPE_CHECKING:
    from uncollapse import geometry, heads, mixing
    from uncollapse.ablation import Ablation, ablate
    from uncollapse.anatomy import Layout
    from uncollapse.claims import verify
    from uncollapse.contributions import HeadContributions, head_contributions
    from uncollapse.diagnosis import Diagnosis, diagnose
    from uncollapse.equivariance import Symmetries, symmetries
    from uncollapse.errors import InputError, UncollapseError, UnsupportedModel
    from uncollapse.gate_installation import install_gates, remove_gates
    from uncollapse.gating import PositionGatedProjection
    from uncollapse.identifiability import Identifiability, identify
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
