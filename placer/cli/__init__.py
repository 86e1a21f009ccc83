"""The command line. Heavy packages are imported inside the verbs that need them, so `placer --help` answers at once."""

import sys
from typing import Annotated

import typer

from placer import __version__
from placer.cli import calibrate, device, lab, plans, schedule, timelines, trace
from placer.core.errors import InputFileError, PlacerError

__all__ = ["app", "main"]

INTERRUPTED = 130
INTERRUPTION = "placer: interrupted; nothing was left half-written\n"

app = typer.Typer(
    name="placer",
    help="Decides where the experts of a Mixture-of-Experts model live: solves, predicts, measures, exports.",
    epilog="Start: placer trace import SRC --from npz -o t.safetensors; placer solve t.safetensors --cluster node8 "
    "-o plan.json; placer export plan.json --to sglang -o map.json",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(trace.app, name="trace")
app.add_typer(device.app, name="device")
plans.register(app)
timelines.register(app)
schedule.register(app)
calibrate.register(app)
lab.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"placer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and stop.")
    ] = False,
) -> None:
    """Decides where the experts of a Mixture-of-Experts model live."""


def main() -> None:
    """Entry point of the `placer` command: placer's own errors become one line and their exit code."""
    try:
        app(prog_name="placer")
    except SystemExit as stop:
        # typer turns Ctrl-C into this
        if stop.code == INTERRUPTED:
            sys.stderr.write(INTERRUPTION)
        raise
    except SystemError as error:
        # how Ctrl-C comes out of a compiled function
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        sys.stderr.write(INTERRUPTION)
        sys.exit(INTERRUPTED)
    except PlacerError as error:
        sys.stderr.write(f"placer: {error}\n")
        sys.exit(error.exit_code)
    except OSError as error:
        # what no reader or writer expected: a name too long, a full disk behind standard output
        sys.stderr.write(f"placer: {error.filename or 'standard output'}: {error.strerror or error}\n")
        sys.exit(InputFileError.exit_code)
    except MemoryError:
        sys.stderr.write("placer: out of memory; use a smaller trace, fewer expert sets or a larger window\n")
        sys.exit(1)
