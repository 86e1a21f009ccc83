"""What launcher and ranks say to each other on one machine: a folder, and lines of progress.

run folder/  heartbeats   how far each rank is            lock     held by the launcher while it lives
             rank-3.json  why rank 3 gave up              job-0.json, result-0.json, arrays
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from placer.core.atomic import write_text_atomically
from placer.core.errors import InputFileError

__all__ = ["PROGRESS_PREFIX", "Report", "RunFolder"]

PROGRESS_PREFIX = "placer-progress: "
"""Begins a line on standard output that is meant for the user."""


@dataclass(frozen=True, slots=True)
class Report:
    """Why a rank gave up. `lost_contact`: because another rank was gone, so it is not the cause."""

    rank: int
    error: str
    message: str
    lost_contact: bool


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The launcher's folder of one launch."""

    VARIABLE: ClassVar[str] = "PLACER_RUN_FOLDER"

    path: Path

    @property
    def heartbeats(self) -> Path:
        """See placer.execute.heartbeat."""
        return self.path / "heartbeats"

    @property
    def lock(self) -> Path:
        """Locked while the launcher lives."""
        return self.path / "lock"

    def report(self, rank: int, error: str, message: str, *, lost_contact: bool) -> None:
        """Leaves word of why `rank` gives up; does nothing where the launcher, and so the folder, is already gone."""
        data = {"rank": rank, "error": error, "message": message, "lost_contact": lost_contact}
        try:
            write_text_atomically(self.path / f"rank-{rank}.json", json.dumps(data))
        except InputFileError:
            return

    def reports(self) -> list[Report]:
        """What ranks left, in rank order."""
        found: list[dict[str, Any]] = [json.loads(p.read_text("utf-8")) for p in self.path.glob("rank-*.json")]
        return sorted((Report(**data) for data in found), key=lambda report: report.rank)

    def environment(self) -> dict[str, str]:
        """The variables that lead ranks here; temporary files of torchrun and its children land here too."""
        return {**os.environ, self.VARIABLE: str(self.path), "TMPDIR": str(self.path)}
