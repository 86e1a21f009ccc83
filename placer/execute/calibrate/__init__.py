"""Calibration: measures links, experts and packing on real ranks and fits a ClusterSpec to them, or refuses.

calibrate -> launch -> worker, one per rank -> Bench -> samples -> fit_link, fit_experts, fit_tail -> ClusterSpec
"""

from placer.execute.calibrate.assemble import Calibration
from placer.execute.calibrate.job import CalibrationJob
from placer.execute.calibrate.run import calibrate

__all__ = ["Calibration", "CalibrationJob", "calibrate"]
