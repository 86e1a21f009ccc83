"""The verbs and flags are frozen: scripts depend on them. Change flags.txt on purpose, with a line in CHANGELOG."""

from pathlib import Path
from typing import Any

import typer

from placer.cli import app

GOLDEN = Path(__file__).with_name("flags.txt")


def flags(command: Any, name: str) -> list[str]:
    inner = getattr(command, "commands", None)
    if inner is not None:
        own = [line for line in spelled(command) if line != "--help"]
        result = [f"{name} {' '.join(own)}"] if own else []
        return result + [line for verb in sorted(inner) for line in flags(inner[verb], f"{name} {verb}")]
    return [" ".join([name, *spelled(command)])]


def spelled(command: Any) -> list[str]:
    """Arguments in their order, then flags by name."""
    arguments = [p.metavar or p.name.upper() for p in command.params if p.param_type_name == "argument"]
    options = sorted("|".join([*p.opts, *p.secondary_opts]) for p in command.params if p.param_type_name == "option")
    return [*arguments, *options]


def test_verbs_and_flags_are_those_of_the_golden_file() -> None:
    found = flags(typer.main.get_command(app), "placer")
    assert found == GOLDEN.read_text(encoding="utf-8").splitlines()


def test_the_verbs_of_the_design_take_the_flags_that_it_spells() -> None:
    lines = {line.split(" ")[1]: line.split(" ") for line in GOLDEN.read_text(encoding="utf-8").splitlines()}
    wanted = {
        "solve": "--cluster --mode --redundant --max-par --solver --time --gap --seed --from --json",
        "check": "--trace --cluster --baseline --max-regression --json",
        "simulate": "--trace --cluster --fidelity --json",
        "run": "--trace --model --ranks --json",
        "export": "--to --json",
        "compare": "--json",
        "profile": "--json",
    }
    for verb, flags_of_verb in wanted.items():
        assert set(flags_of_verb.split()) <= set(lines[verb]), verb
        assert verb in ("check", "compare") or "-o|--output" in lines[verb]
