"""The `kvstrata` command line: one small module per verb, which imports what it needs when it is called.

Every error that a user can cause ends in one sentence on standard error and exit code 1, without a traceback.
"""

import sys
from importlib import import_module

import typer

from golden.spec import KVStrataError

VERBS = (
    "accuracy",
    "bench",
    "calibrate",
    "cells",
    "check-rtl",
    "compile",
    "device",
    "disasm",
    "docs",
    "generate",
    "notebooks",
    "pack",
    "profile",
    "report",
    "reproduce",
    "simulate",
    "sweep",
    "synth",
    "verilog",
)
"""Each is the function `command` of the module of that name, with underscores for dashes."""

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Where should the KV cache live, and who should compute on it?"""


for _verb in VERBS:
    app.command(_verb)(import_module(f"{__name__}.{_verb.replace('-', '_')}").command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line on `arguments` (default: those of the process) and exit."""
    try:
        app(arguments)
    except KVStrataError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
