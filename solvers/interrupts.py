"""Ctrl-C that ends a search and keeps what it has found."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["Interrupt", "interruptible"]


@dataclass(slots=True)
class Interrupt:
    """Whether Ctrl-C ended the body, and the exception that it came as, for who has nothing to keep."""

    error: KeyboardInterrupt | None = None

    @property
    def happened(self) -> bool:
        """Whether the body was ended early."""
        return self.error is not None


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """A body that Ctrl-C ends early instead of raising; a second Ctrl-C, after the body, raises as ever."""
    interrupt = Interrupt()
    try:
        yield interrupt
    except KeyboardInterrupt as error:
        interrupt.error = error
    except SystemError as error:
        # how Ctrl-C comes out of a compiled function
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        interrupt.error = error.__cause__
