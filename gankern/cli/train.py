"""`gankern train`: the options are the fields of TrainConfig."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from gankern.models import PRESETS
from gankern.training.config import TrainConfig, TrainError, flag, make_config

# What may differ when a run is resumed: how long and where it runs, not what it computes.
MAY_CHANGE = ("kimg", "device", "on_alarm", "max_rollbacks")


class TrainCommand(click.Command):
    """Lists the options in the groups of the configuration."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Command": []}
        names = {f.name: f.metadata["group"] for f, _ in TrainConfig.options()}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record:
                groups.setdefault(names.get(param.name or "", "Command"), []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)
        with formatter.section("Presets"):
            presets = {
                name: ", ".join(as_given(key, value) for key, value in values.items())
                for name, values in PRESETS.items()
            }
            formatter.write_dl([(name, text or "the defaults") for name, text in presets.items()])


def as_given(name: str, value: Any) -> str:
    """An option as it is typed: --batch 16, --mirror, --no-conditional."""
    if isinstance(value, bool):
        return flag(name) if value else f"--no-{flag(name)[2:]}"
    return f"{flag(name)} {value}"


def config_options() -> list[click.Option]:
    """An option for every field; not given, it is None, so that presets and runs can say."""
    options = []
    for f, kind in TrainConfig.options():
        unit = f.metadata["unit"]
        default = str(f.default).lower() if kind is bool else f.default
        default = "none" if default == "" else default
        choices = f.metadata["choices"]
        options.append(
            click.Option(
                [f"{flag(f.name)}/--no-{flag(f.name)[2:]}" if kind is bool else flag(f.name)],
                type=click.Choice(choices) if choices else kind,
                default=None,
                metavar=None if choices or kind is bool else kind.__name__.upper(),
                help=f"{f.metadata['help']}  [{f'{unit}; ' if unit else ''}default: {default}]",
            )
        )
    return options


@click.command(cls=TrainCommand, params=config_options())
@click.option(
    "--preset",
    default="",
    metavar="NAME",
    help="Options that belong together, listed below.  [default: none]",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Go on in this run folder; beside it only --kimg, --device, --on-alarm and"
    " --max-rollbacks may be given.  [default: none]",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print configuration, networks, memory; write nothing.  [default: false]",
)
def command(preset: str, resume: Path | None, dry_run: bool, **options: Any) -> None:
    """Train a GAN; without arguments a DCGAN on 5,000 MNIST digits, in a folder below runs/.

    Under torchrun (torchrun --nproc-per-node 2 -m gankern train ...) processes share each batch.
    """
    given = {name: value for name, value in options.items() if value is not None}
    try:
        config = resumed_config(resume, preset, given) if resume else make_config(preset, **given)
        if dry_run:
            click.echo(describe(config))
            return
        from gankern.training.loop import train

        train(config, resume)
    except (ValueError, OSError) as error:
        from gankern.training.distributed import LostProcessError

        lost = isinstance(error, LostProcessError)
        if int(os.environ.get("RANK", "0")) and not lost:  # the first process says it
            raise SystemExit(2) from None
        raise


def resumed_config(run: Path, preset: str, given: dict[str, Any]) -> TrainConfig:
    """The configuration of a run folder, with what may change changed (TrainError otherwise)."""
    from gankern.training.run import read_config

    config = read_config(run)
    if preset:
        raise TrainError(
            "--preset cannot be given with --resume, which keeps the run's own options"
        )
    for name, value in given.items():
        if name not in MAY_CHANGE and value != getattr(config, name):
            old = getattr(config, name)
            raise TrainError(f"{flag(name)} must be {old}, as {run} was started with, got {value}")
        setattr(config, name, value)
    return config.check()


def describe(config: TrainConfig) -> str:
    """The resolved configuration, the parameters of both networks, and the memory, as text.

    Raises:
        ValueError: what training would refuse before it starts (TrainError and its like).
    """
    import torch

    from gankern import models
    from gankern.data.subset import hold_out
    from gankern.metrics import load_extractor
    from gankern.training.distributed import choose_device, rank_and_world
    from gankern.training.graphs import check_graphs
    from gankern.training.loop import open_data
    from gankern.training.memory import memory_table
    from gankern.training.schedule import Schedule, level_sides

    device, (_, world) = choose_device(config.device), rank_and_world()
    hold_out(open_data(config), config.held_out, config.first_seed)
    with torch.device("meta"):
        G, D = models.build(config)
    Schedule(config, level_sides(D), world)
    if config.cuda_graphs:
        check_graphs(config, device, world)
    if config.metrics_ticks:
        load_extractor(config.metrics_extractor)
    lines = [config.to_json()]
    for name, net in (("G", G), ("D", D)):
        total = sum(p.numel() for p in net.parameters())
        lines.append(f"{name}: {total:,} parameters ({4 * total / 2**20:.1f} MiB)")
        lines += [
            f"  {key:<40} {'x'.join(map(str, p.shape)):<20} {p.numel():>12,}"
            for key, p in net.named_parameters()
        ]
    lines.append("Memory of one process, about:")
    rows = memory_table(config, world)
    lines += [f"  {what:<61} {size / 2**20:>8,.1f} MiB" for what, size in rows]
    return "\n".join(lines)
