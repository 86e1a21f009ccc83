"""What the operating system says of this process: bytes read from disks, resident memory now and at its peak."""

from pathlib import Path

__all__ = ["disk_read_bytes", "peak_rss_bytes", "reset_peak_rss", "rss_bytes"]

PROC = Path("/proc/self")


def disk_read_bytes() -> int | None:
    """Bytes that this process caused to be read from disks, not from the page cache; None where nobody counts."""
    return _field("io", "read_bytes:")


def rss_bytes() -> int | None:
    """Resident memory in bytes, or None."""
    kib = _field("status", "VmRSS:")
    return None if kib is None else kib * 1024


def peak_rss_bytes() -> int | None:
    """The most resident memory since the process began or `reset_peak_rss`, in bytes, or None."""
    kib = _field("status", "VmHWM:")
    return None if kib is None else kib * 1024


def reset_peak_rss() -> bool:
    """Makes the peak what is resident now; returns whether the system let it."""
    try:
        (PROC / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _field(file: str, name: str) -> int | None:
    try:
        lines = (PROC / file).read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), None)
