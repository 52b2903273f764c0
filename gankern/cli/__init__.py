"""The command `gankern`: a group whose subcommands are files of this package, loaded when called.

`gankern/cli/<name>.py` defines one click command (or group) named `command`.
"""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from gankern import __version__
from gankern.memory import keep_memory

# Name and one-line help, so that `gankern --help` imports none of them; a missing file is no entry.
COMMANDS = {
    "train": "Train a GAN; without arguments a DCGAN on MNIST digits.",
    "generate": "Write images, grids and latent walks from a trained run.",
    "data": "Pack folders and archives of images into a data set.",
    "metrics": "Measure the quality of generated images.",
    "project": "Find the latent of an image.",
    "report": "Write a run's report.",
    "bench": "Measure the operations on this machine.",
    "doctor": "Show what is built, what each operation would use, and what is missing.",
}


class UserError(click.ClickException):
    """Wrong input, told in one line: `gankern: <message>`, exit code 2."""

    exit_code = 2


def explain(error: Exception) -> str | None:
    """The one line for an error that wrong input causes, None for what must be a bug."""
    if isinstance(error, click.UsageError):
        usage = error.ctx.command_path if error.ctx else "gankern"
        return f"{error.format_message().rstrip('.')} (see {usage} --help)"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, (OSError, ValueError)):
        return str(error)
    return None


class Commands(click.Group):
    """The subcommands, imported one at a time, and the one place where errors become exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in COMMANDS if importlib.util.find_spec(f"gankern.cli.{name}")]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(f"gankern.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in args
        extra["standalone_mode"] = False
        keep_memory()
        try:
            status = super().main([arg for arg in args if arg != "--debug"], *rest, **extra)
        except (click.Abort, KeyboardInterrupt):
            click.echo("gankern: interrupted", err=True)
            sys.exit(130)
        except Exception as error:
            line = explain(error)
            if line is None:
                raise
            if debug:
                traceback.print_exc()
            click.echo(f"gankern: {' '.join(line.split())}", err=True)
            sys.exit(2)
        sys.exit(status if isinstance(status, int) else 0)


@click.group(name="gankern", cls=Commands)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, message="gankern %(version)s")
def main(debug: bool) -> None:
    """Train, run and measure GANs built from fused operations."""
