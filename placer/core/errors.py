"""The exception tree. Each class carries the exit code that the command line returns.

    PlacerError                1   anything placer refuses
    ├── UsageError             2   a flag or argument that makes no sense (typer uses 2 as well)
    ├── InputFileError         3   a file that is missing, truncated, corrupt or not what it says
    ├── MismatchError          4   two valid things that do not belong together (plan and trace, plan and cluster)
    ├── InfeasibleError        5   no placement exists under the limits given
    ├── ViolationError         6   a plan that breaks a rule of the problem
    ├── RegressionError        7   a plan that is worse than its baseline allows
    ├── SolverError            8   a solver back end that failed
    ├── DependencyError        9   an optional package that is not installed
    └── ExecutionError        10   a rank that failed, hung or died
Ctrl-C ends with 130, as shells expect.
"""

__all__ = [
    "DependencyError",
    "ExecutionError",
    "InfeasibleError",
    "InputFileError",
    "MismatchError",
    "PlacerError",
    "RegressionError",
    "SolverError",
    "UsageError",
    "ViolationError",
]


class PlacerError(Exception):
    """Base of everything placer raises on purpose; its text is one line a user can act on."""

    exit_code = 1


class UsageError(PlacerError):
    """A value given by the caller that makes no sense; names the field, the value and the mend."""

    exit_code = 2


class InputFileError(PlacerError):
    """A file that cannot be read as what it claims to be."""

    exit_code = 3


class MismatchError(PlacerError):
    """Two inputs, each valid, that do not describe the same thing."""

    exit_code = 4


class InfeasibleError(PlacerError):
    """No placement satisfies the limits; says which limit and by how much."""

    exit_code = 5


class ViolationError(PlacerError):
    """A plan that breaks at least one rule of its problem."""

    exit_code = 6


class RegressionError(PlacerError):
    """A plan measurably worse than its baseline."""

    exit_code = 7


class SolverError(PlacerError):
    """A solver back end that crashed or returned nonsense."""

    exit_code = 8


class DependencyError(PlacerError):
    """An optional package is missing; names the extra that installs it."""

    exit_code = 9


class ExecutionError(PlacerError):
    """A rank of a measured run that failed; names the rank and the reason."""

    exit_code = 10
