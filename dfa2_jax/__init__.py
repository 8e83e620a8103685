"""SD3, SD3.5, FLUX.1 and CogVideoX in JAX, made fast by head-wise compression (DiTFastAttnV2, arXiv 2503.22796).

Public names are imported when they are first asked for: `import dfa2_jax` imports no JAX.

Dim letters: `B` batch, `T` query tokens, `S` key tokens, `N` heads, `H` head dim, `D` width.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dfa2_jax.calibration.calibrate import calibrate as calibrate
    from dfa2_jax.conversion import convert_checkpoint as convert_checkpoint
    from dfa2_jax.io.errors import CheckpointError as CheckpointError
    from dfa2_jax.pipeline.output import Output as Output
    from dfa2_jax.pipeline.pipeline import Pipeline as Pipeline
    from dfa2_jax.plan.method import Method as Method
    from dfa2_jax.plan.method import PlanError as PlanError
    from dfa2_jax.plan.plan import Plan as Plan
    from dfa2_jax.report.report import quality_report as quality_report
    from dfa2_jax.report.table import Report as Report

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Method",
    "Output",
    "Pipeline",
    "Plan",
    "PlanError",
    "Report",
    "__version__",
    "calibrate",
    "convert_checkpoint",
    "quality_report",
]

_MODULES = {
    "CheckpointError": "dfa2_jax.io.errors",
    "Method": "dfa2_jax.plan.method",
    "Output": "dfa2_jax.pipeline.output",
    "Pipeline": "dfa2_jax.pipeline.pipeline",
    "Plan": "dfa2_jax.plan.plan",
    "PlanError": "dfa2_jax.plan.method",
    "Report": "dfa2_jax.report.table",
    "calibrate": "dfa2_jax.calibration.calibrate",
    "convert_checkpoint": "dfa2_jax.conversion",
    "quality_report": "dfa2_jax.report.report",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | {*__all__})
