"""`gankern bench <name> ...`: the scripts of benchmarks/, in a source tree."""

import subprocess
import sys
from pathlib import Path

import click

import gankern
from gankern.cli import UserError

FOLDER = Path(gankern.__file__).resolve().parents[1] / "benchmarks"

SCRIPTS = {
    "ops": "Time every operation against the reference.",
    "steps": "Time the steps of training each model.",
    "overhead": "Time the dispatch of a call, on one element.",
    "launches": "Count kernel launches and bytes of a training step.",
    "predicted": "Predict each kernel's least time on GPUs.",
    "external": "Time another StyleGAN implementation beside this one.",
    "compare": "Time two commits, interleaved.",
    "plots": "Draw the results of ops and steps.",
}


def run(name: str, arguments: tuple[str, ...]) -> int:
    """The script's exit code."""
    script = FOLDER / f"{name}.py"
    if not script.is_file():
        raise UserError(
            f"bench: {script} does not exist: benchmarks are in the source tree alone, "
            "run `gankern bench` in a clone with `pip install -e .`"
        )
    return subprocess.run([sys.executable, str(script), *arguments]).returncode


@click.group()
def command() -> None:
    """Measure the operations on this machine; `gankern bench ops --help` for each one's options."""


def _add(name: str, line: str) -> None:
    settings = {"ignore_unknown_options": True, "allow_interspersed_args": False}

    @command.command(name, help=line, add_help_option=False, context_settings=settings)
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def script(arguments: tuple[str, ...]) -> int:
        return run(name, arguments)


for _name, _line in SCRIPTS.items():
    _add(_name, _line)
