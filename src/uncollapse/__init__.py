"""uncollapse: diagnose, explain and undo representational collapse in Transformers.

    import uncollapse as uc
    uc.diagnose(model, texts, tokenizer=tokenizer).show()

Everything below is loaded on first use. So importing the package is fast, and `uncollapse --help` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # the only place: packaging, records and `--version` read it from here

_HOME = {
    "Ablation": "analyses.ablation",
    "Attribution": "analyses.attribution",
    "Comparison": "analyses.comparison",
    "Diagnosis": "analyses.diagnosis",
    "HeadContributions": "probe.contributions",
    "Identifiability": "analyses.heads",
    "InputError": "errors",
    "Layout": "anatomy.vocabulary",
    "Monitor": "monitoring.monitor",
    "PositionGatedProjection": "gates.projection",
    "Sweep": "analyses.sweep",
    "Symmetries": "analyses.symmetries",
    "UncollapseError": "errors",
    "UnsupportedModel": "errors",
    "Verification": "analyses.ledger",
    "ablate": "analyses.ablation",
    "attribute": "analyses.attribution",
    "compare": "analyses.comparison",
    "channels_of": "symmetry.channels",
    "diagnose": "analyses.diagnosis",
    "forget": "anatomy.situations",
    "gate_report": "gates.broken",
    "head_contributions": "probe.contributions",
    "identify": "analyses.heads",
    "install_gates": "gates.installation",
    "load": "analyses.stored",
    "logit_difference": "probe.metrics",
    "next_token_loss": "probe.metrics",
    "rank_change": "measures.normalization",
    "remove_gates": "gates.installation",
    "sweep": "analyses.sweep",
    "symmetries": "analyses.symmetries",
    "verify": "analyses.ledger",
    "without": "interventions.without",
}
_MODULES = ("exact", "geometry", "heads", "mixing")  # of `measures`

__all__ = [
    "Ablation",
    "Attribution",
    "Comparison",
    "Diagnosis",
    "HeadContributions",
    "Identifiability",
    "InputError",
    "Layout",
    "Monitor",
    "PositionGatedProjection",
    "Sweep",
    "Symmetries",
    "UncollapseError",
    "UnsupportedModel",
    "Verification",
    "__version__",
    "ablate",
    "attribute",
    "channels_of",
    "compare",
    "diagnose",
    "exact",
    "forget",
    "gate_report",
    "geometry",
    "head_contributions",
    "heads",
    "identify",
    "install_gates",
    "load",
    "logit_difference",
    "mixing",
    "next_token_loss",
    "rank_change",
    "remove_gates",
    "sweep",
    "symmetries",
    "verify",
    "without",
]

if TYPE_CHECKING:
    from uncollapse.analyses.ablation import Ablation, ablate
    from uncollapse.analyses.attribution import Attribution, attribute
    from uncollapse.analyses.comparison import Comparison, compare
    from uncollapse.analyses.diagnosis import Diagnosis, diagnose
    from uncollapse.analyses.heads import Identifiability, identify
    from uncollapse.analyses.ledger import Verification, verify
    from uncollapse.analyses.stored import load
    from uncollapse.analyses.sweep import Sweep, sweep
    from uncollapse.analyses.symmetries import Symmetries, symmetries
    from uncollapse.anatomy.situations import forget
    from uncollapse.anatomy.vocabulary import Layout
    from uncollapse.errors import InputError, UncollapseError, UnsupportedModel
    from uncollapse.gates.broken import gate_report
    from uncollapse.gates.installation import install_gates, remove_gates
    from uncollapse.gates.projection import PositionGatedProjection
    from uncollapse.interventions.without import without
    from uncollapse.measures import exact, geometry, heads, mixing
    from uncollapse.measures.normalization import rank_change
    from uncollapse.monitoring.monitor import Monitor
    from uncollapse.probe.contributions import HeadContributions, head_contributions
    from uncollapse.probe.metrics import logit_difference, next_token_loss
    from uncollapse.symmetry.channels import channels_of


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"uncollapse.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"uncollapse.measures.{name}")
    else:
        raise AttributeError(f"module 'uncollapse' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
