"""The arrow, station by station: what the command line and the examples call.

RoutingTrace -> Profile -> PlacementProblem -> SolveResult -> Plan -> check, simulate, run, export.
"""

from placer.pipeline.calibrating import calibrate_cluster
from placer.pipeline.checking import CheckReport, check_plan
from placer.pipeline.generating import Completion, generate, read_prompts
from placer.pipeline.planning import BASELINES, DEFAULT_CAP, Solved, judge, make_plan, solve
from placer.pipeline.proving import Proof, certificate_of, prove, stored_certificate
from placer.pipeline.scheduling import ScheduledKind, schedule_plan
from placer.pipeline.sources import model_of_plan, open_source, open_trace, profile_of, sources_of, warn_mismatch
from placer.pipeline.timelines import Measured, measure, predict

__all__ = [
    "BASELINES",
    "DEFAULT_CAP",
    "CheckReport",
    "Completion",
    "Measured",
    "Proof",
    "ScheduledKind",
    "Solved",
    "calibrate_cluster",
    "certificate_of",
    "check_plan",
    "generate",
    "judge",
    "make_plan",
    "measure",
    "model_of_plan",
    "open_source",
    "open_trace",
    "predict",
    "profile_of",
    "prove",
    "read_prompts",
    "schedule_plan",
    "solve",
    "sources_of",
    "stored_certificate",
    "warn_mismatch",
]
