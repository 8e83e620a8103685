"""SD3, SD3.5 and FLUX.1 in JAX, made fast by head-wise attention compression (DiTFastAttnV2, arXiv 2503.22796).

Dim letters: `B` batch, `T` query tokens, `S` key tokens, `N` heads, `H` head dim, `D` width.
"""

from .calibration import calibrate as calibrate
from .faults import CheckpointError as CheckpointError
from .output import Output as Output
from .pipeline import Pipeline as Pipeline
from .plan import Method as Method
from .plan import Plan as Plan
from .plan import PlanError as PlanError
from .report import quality_report as quality_report
from .report_table import Report as Report
