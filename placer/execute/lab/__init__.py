"""A shaped multi-node cluster on one machine: `with Lab.open(LabSpec.parse("2x2@200mbit")) as lab`."""

from placer.execute.lab.commands import require_command, run_command
from placer.execute.lab.network import Lab, require_lab
from placer.execute.lab.owner import clean_leftovers
from placer.execute.lab.spec import LabSpec

__all__ = ["Lab", "LabSpec", "clean_leftovers", "require_command", "require_lab", "run_command"]
