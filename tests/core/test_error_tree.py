"""The exception tree: one exit code each, and a drawing that shows what there is."""

import inspect
import re

from placer.core import errors
from placer.core.errors import PlacerError

CLASSES = {
    name: value for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)
}


def drawn() -> list[tuple[str, int, int]]:
    """(name, exit code, depth) of each line of the docstring's drawing."""
    lines = re.findall(r"^( +)((?:[│ ]*[├└]── )?)(\w+Error)\s+(\d+)\s+\S", errors.__doc__, flags=re.MULTILINE)
    return [(name, int(code), len(branch) // 4) for _, branch, name, code in lines]


def test_exit_codes_are_distinct_and_leave_the_shells_alone() -> None:
    codes = {name: kind.exit_code for name, kind in CLASSES.items()}
    assert len(set(codes.values())) == len(codes)
    assert all(0 < code < 126 for code in codes.values())
    assert codes["UsageError"] == 2, "typer ends with 2 as well"


def test_the_drawing_is_the_classes() -> None:
    lines = drawn()
    assert {name: code for name, code, _ in lines} == {name: kind.exit_code for name, kind in CLASSES.items()}
    parents: list[str] = []
    for name, _, depth in lines:
        del parents[depth:]
        assert CLASSES[name].__bases__ == ((CLASSES[parents[-1]],) if parents else (Exception,))
        parents.append(name)


def test_all_names_every_class_in_order() -> None:
    assert errors.__all__ == sorted(CLASSES)


def test_everything_is_a_placer_error_with_a_docstring_of_its_own() -> None:
    for kind in CLASSES.values():
        assert issubclass(kind, PlacerError)
        assert "exit_code" in vars(kind)
        assert kind.__doc__


def test_ctrl_c_is_in_the_docstring() -> None:
    assert "130" in errors.__doc__
