"""`placer lab`: a shaped cluster on one machine, for as long as one command runs on every rank of it."""

from typing import Annotated

import typer

from placer.cli.common import status_line
from placer.core.errors import UsageError

__all__ = ["register"]


def lab(
    shape: Annotated[
        str | None,
        typer.Argument(metavar="SHAPE", help="NODESxRANKS@RATE: 2x2@200mbit, 4x1@1gbit, or 2x2 for unshaped links."),
    ] = None,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- COMMAND", help="Runs once per rank, with torchrun's variables set."),
    ] = None,
    clean: Annotated[
        bool, typer.Option("--clean", help="Only remove what labs left whose `placer lab` was killed.")
    ] = False,
) -> None:
    """Runs a command on every rank of a shaped multi-node cluster on this machine (needs root and Linux).

    Each node is a network namespace, gone when the command ends, however it ends. Exit code: that of the first rank
    that fails, after which the others are ended.
    """
    from placer.execute.lab import Lab, LabSpec, clean_leftovers, require_command, require_lab, run_command

    if clean:
        if shape is not None:
            raise UsageError("--clean takes no shape and no command; leave one or the other out")
        require_lab()
        for name in clean_leftovers():
            status_line(f"removed namespace {name}")
        return
    if shape is None:
        raise UsageError("a shape is missing; write `placer lab 2x2@200mbit -- COMMAND`, or `placer lab --clean`")
    spec = LabSpec.parse(shape)
    require_command(command or ())
    with Lab.open(spec) as opened:
        code = run_command(opened, command or ())
    raise typer.Exit(code)


def register(app: typer.Typer) -> None:
    """Adds the verb to `app`."""
    app.command(no_args_is_help=True)(lab)
