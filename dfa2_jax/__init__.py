"""SD3, SD3.5 and FLUX.1 in JAX, made fast by head-wise attention compression (DiTFastAttnV2, arXiv 2503.22796).

Dim letters: `B` batch, `T` query tokens, `S` key tokens, `N` heads, `H` head dim, `D` width.
"""

from dfa2_jax.calibration.calibrate import calibrate as calibrate
from dfa2_jax.conversion import convert_checkpoint as convert_checkpoint
from dfa2_jax.io.errors import CheckpointError as CheckpointError
from dfa2_jax.pipeline.output import Output as Output
from dfa2_jax.pipeline.pipeline import Pipeline as Pipeline
from dfa2_jax.plan.plan import Method as Method
from dfa2_jax.plan.plan import Plan as Plan
from dfa2_jax.plan.plan import PlanError as PlanError
from dfa2_jax.report.report import quality_report as quality_report
from dfa2_jax.report.table import Report as Report
