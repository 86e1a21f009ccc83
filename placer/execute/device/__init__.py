"""One device measured: planes read from a real disk while real experts compute, as a DevicePlan says.

    run_device -> open_session -> SiteRunner (computes) + PlaneReader (reads) -> Timeline

Importing this package needs torch.
"""

from placer.execute.device.calibrate import calibrate_device
from placer.execute.device.generate import generate_on_device
from placer.execute.device.loop import run_device
from placer.execute.device.random_planes import write_random_planes

__all__ = ["calibrate_device", "generate_on_device", "run_device", "write_random_planes"]
