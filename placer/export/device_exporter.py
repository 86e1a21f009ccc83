"""What every exporter of a device plan is: functions from a plan (and where its planes lie) to the bytes of a file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from placer.core.atomic import write_atomically
from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex
from placer.core.errors import InputFileError, MismatchError, UsageError

__all__ = ["DeviceExporter", "refuse_other_planes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceExporter:
    """One loader's file form of a device plan.

    suffixes   names of the file may end in these
    encode     (plan, planes or None) -> bytes of the file
    differs    (bytes, plan, planes or None) -> what the file says otherwise than the plan, or "": written without
               `encode`, so that the two check each other
    launch     (plan, path) -> the loader's own flags that use the file
    warnings   (plan) -> what the loader will do otherwise than the plan says
    """

    name: str
    about: str
    suffixes: tuple[str, ...]
    encode: Callable[[DevicePlan, PlaneIndex | None], bytes]
    differs: Callable[[bytes, DevicePlan, PlaneIndex | None], str]
    launch: Callable[[DevicePlan, Path], str]
    warnings: Callable[[DevicePlan], tuple[str, ...]]

    def write(self, plan: DevicePlan, planes: PlaneIndex | None, path: Path) -> None:
        """Writes the plan to `path`, reads it back, and only then lets it replace what was there.

        Raises UsageError for a wrong suffix, MismatchError for planes of another plan, InputFileError when the file
        cannot be written or does not read back as the plan.
        """
        path = Path(path)
        if path.suffix not in self.suffixes:
            raise UsageError(
                f"{path}: {self.name} is written to files ending in {' or '.join(self.suffixes)}; rename it"
            )
        if planes is not None:
            refuse_other_planes(plan, planes)
        payload = self.encode(plan, planes)

        def write_and_compare(temporary: Path) -> None:
            temporary.write_bytes(payload)
            if difference := self.differs(temporary.read_bytes(), plan, planes):
                raise InputFileError(f"{path}: reads back otherwise ({difference}); nothing was written, try again")

        write_atomically(path, write_and_compare)


def refuse_other_planes(plan: DevicePlan, planes: PlaneIndex) -> None:
    """Raises MismatchError where a plan was not made for such planes."""
    for field in ("num_hidden_layers", "moe_layers", "num_experts", "ladder", "plane_bytes_K"):
        wanted, found = getattr(plan, field), getattr(planes, field)
        if wanted != found:
            raise MismatchError(
                f"{planes.path}: has {field} {str(found)[:80]}, the plan {str(wanted)[:80]}; give the planes that were "
                "planned for"
            )
    known = plan.hashes.get("planes")
    if known is not None and known != planes.sha256:
        raise MismatchError(f"{planes.path}: is not the file that the plan was made for; plan again with it")
