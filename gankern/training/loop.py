"""The training loop."""

from __future__ import annotations

import contextlib
import copy
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern import models
from gankern.data import Dataset, open_dataset
from gankern.data.subset import hold_out
from gankern.training import checkpoint
from gankern.training.ada import Ada
from gankern.training.augment import make_augment
from gankern.training.config import TrainConfig
from gankern.training.distributed import choose_device, process_group
from gankern.training.ema import update_ema
from gankern.training.evaluate import Evaluator
from gankern.training.graphs import GraphedPass, check_graphs
from gankern.training.inputs import Inputs
from gankern.training.monitor import Monitor, Unhealthy, decisions
from gankern.training.noise import derive_seed
from gankern.training.optim import Updater, clip_weights
from gankern.training.phases import Phases
from gankern.training.probe import SAMPLES
from gankern.training.progress import Progress
from gankern.training.rollback import roll_back
from gankern.training.run import RunLog, create_run
from gankern.training.schedule import Schedule, level_sides
from gankern.training.stats import TickStats


def open_data(config: TrainConfig) -> Dataset:
    """Opens the data set of a configuration, and writes the images' size into the latter."""
    dataset = open_dataset(config.data)
    config.resolution = dataset.resolution
    config.channels = dataset.channels
    config.num_classes = dataset.num_classes
    config.label_dim = dataset.label_dim
    return dataset


def train(config: TrainConfig, resume: Path | None = None) -> Path | None:
    """Trains a GAN in a new run folder, or goes on in an old one.

    Under torchrun, call it in every process; each sees its own part of every batch.

    Args:
        config: of the run; of a resumed one, what its config.json holds.
        resume: run folder to go on in, from its last checkpoint (from the start if it has none).

    Returns:
        The run folder (None in processes other than the first).

    Raises:
        ValueError: input that cannot be used (TrainError, DataError); nothing has been written.
        OSError: the disk is full or cannot be written.
    """
    device = choose_device(config.device)
    with process_group(device) as (rank, world):
        while True:
            folder: list[Path] = []
            try:
                with contextlib.ExitStack() as stack:
                    return _train(config, resume, device, rank, world, stack, folder)
            except Unhealthy as error:
                if config.on_alarm != "rollback":
                    raise
                resume = roll_back(error, config, folder[0] if folder else None)


def _train(
    config: TrainConfig, resume: Path | None, device: torch.device, rank: int, world: int,
    stack: contextlib.ExitStack, folder: list[Path],
) -> Path | None:  # fmt: skip
    # Data and networks, the same networks in every process.
    dataset, held = hold_out(open_data(config), config.held_out, config.first_seed)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    G: Any
    D: Any
    G, D = (net.train().to(device) for net in models.build(config))
    if config.channels_last:
        G, D = (net.to(memory_format=torch.channels_last) for net in (G, D))
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    schedule = Schedule(config, level_sides(D), world)
    inputs = Inputs(config, dataset, G, D, device, rank, world)

    # Losses, penalties, augmentation, optimizers.
    ada = Ada(config, device, world) if config.augment == "ada" else None
    phases = Phases(config, G, D, make_augment(config, ada), device, world)
    penalised = bool(config.r1_gamma or config.r2_gamma or config.gp_weight)
    lazy_D = config.d_reg_interval if penalised and config.d_reg_interval > 1 else 0
    lazy_G = config.g_reg_interval if config.pl_weight and config.g_reg_interval > 1 else 0
    G_up = Updater(G, config.g_optimizer, config, lazy_G, world)
    D_up = Updater(D, config.d_optimizer, config, lazy_D, world)
    main_D, main_G = phases.main_D, phases.main_G
    if config.cuda_graphs:
        check_graphs(config, device, world)
        main_D, main_G = GraphedPass(main_D, D), GraphedPass(main_G, G)

    # Health, and quality if asked for.
    monitor = Monitor(config, dataset, held, G, D, device, world)
    evaluator = Evaluator(config, dataset, device) if config.metrics_ticks else None

    # Where an earlier process stopped.
    parts: checkpoint.Parts = {
        "G": G,
        "D": D,
        "G_ema": G_ema,
        "optimizer_G": G_up.optimizer,
        "optimizer_D": D_up.optimizer,
    }
    saved = checkpoint.load_checkpoint(resume) if resume else None
    cur_nimg, step, seconds = 0, 0, 0.0
    if saved:
        checkpoint.restore(saved, parts)
        inputs.sampler.load_state_dict(saved.state["sampler"])
        cur_nimg, step, seconds = (saved.state[name] for name in ("cur_nimg", "step", "seconds"))
        inputs.sampler.seed = config.seed  # another one after a rollback
        monitor.load_state_dict(saved.state["monitor"])
        restore_engine(saved.state["engine"], phases, ada, G_up, D_up)

    # The run folder and what is shown: the first process's work.
    log = None
    if rank == 0:
        run = resume or create_run(config, dataset.name)
        folder.append(run)
        log = stack.enter_context(RunLog(run, config, saved.state["sizes"] if saved else {}))
    total, tick_nimg = round(config.kimg * 1000), round(config.tick_kimg * 1000)
    progress = stack.enter_context(Progress(total, cur_nimg, log.run if log else None))
    for line in saved.damaged if saved else []:
        progress.say(f"warning: {line}; going on from {cur_nimg / 1000} kimg")
    stats = TickStats(world, seconds)
    grid_z, grid_c = inputs.grid(config.grid)
    probe_z, probe_c = inputs.grid(math.isqrt(SAMPLES))
    notes = [note for note in config.rollbacks if note["to_kimg"] == cur_nimg / 1000]
    for note in notes:
        progress.say(f"rolled back to {note['to_kimg']:g} kimg: {note['alarm']['kind']}")
    shown = 0  # images of the last step

    def crossed(ticks: int) -> bool:
        """Whether the last step has completed a multiple of so many ticks, or the run."""
        nimg = ticks * tick_nimg
        return cur_nimg >= total or cur_nimg // nimg != (cur_nimg - shown) // nimg

    set_growth(schedule.growth(cur_nimg), config, G, D, G_ema)
    if log and not saved:
        log.write_samples(sample(G_ema, grid_z, grid_c, config), cur_nimg)
    while cur_nimg < total:
        # Growth, batch and learning rates of this step.
        set_growth(schedule.growth(cur_nimg), config, G, D, G_ema)
        batch = schedule.batch(cur_nimg)
        g_lr, d_lr = schedule.lr(config.g_lr, cur_nimg), schedule.lr(config.d_lr, cur_nimg)
        passes = max(batch // world // (config.batch_gpu or batch), 1)
        before = cur_nimg

        # D, n_critic times: the plain pass, and penalties with it or as a step of their own.
        for _ in range(config.n_critic):
            part_D = inputs.draw_D(cur_nimg, batch)
            values = D_up.backward(main_D, part_D.split(passes))
            if penalised and not lazy_D:
                values |= D_up.backward(phases.regularise_D, part_D.split(passes), fresh=False)
            values |= {f"{name}_D": value for name, value in D_up.step(d_lr).items()}
            d_step = step * config.n_critic + (cur_nimg - before) // batch
            if lazy_D and d_step % lazy_D == 0:
                values |= D_up.backward(phases.regularise_D, part_D.split(passes))
                stats.add(0, skipped_D=D_up.step(d_lr)["skipped"])
            if config.clip_weights:
                clip_weights(D, config.clip_weights)
            if ada:
                ada.update(values["logit_real"], batch)
                values["ada_p"] = ada.p
            values |= decisions(values["logit_real"], values["logit_fake"], config.loss)
            stats.add(batch, **values)
            cur_nimg += batch

        # G: the plain pass, and path length.
        D.requires_grad_(False)
        part_G = inputs.draw_G(before, batch, part_D)
        values = G_up.backward(main_G, part_G.split(passes))
        if config.pl_weight and not lazy_G:
            values |= G_up.backward(phases.regularise_G, part_G.split(passes), fresh=False)
        values |= {f"{name}_G": value for name, value in G_up.step(g_lr).items()}
        if lazy_G and step % lazy_G == 0:
            values |= G_up.backward(phases.regularise_G, part_G.split(passes))
            stats.add(0, skipped_G=G_up.step(g_lr)["skipped"])
        D.requires_grad_(True)

        # Moving average of G.
        shown = cur_nimg - before
        update_ema(G_ema, G, shown, before, config.ema_kimg * 1000, config.ema_rampup)

        # Counters and status.
        step += 1
        stats.add(0, **values)
        progress.step(cur_nimg)
        if crossed(ticks=1):
            row: dict[str, Any] = {"kimg": cur_nimg / 1000, "step": step}
            row["epoch"] = cur_nimg / len(dataset)
            stats.waited, inputs.waited = inputs.waited, 0.0
            row |= stats.take() | {"lr_G": g_lr, "lr_D": d_lr}
            row |= {"growth": schedule.growth(before)} if config.grows else {}
            if config.precision == "fp16":
                row |= {"scale_G": G_up.scaler.get_scale(), "scale_D": D_up.scaler.get_scale()}
            probes = sample(G_ema, probe_z, probe_c, config)
            monitor.fill(row, G, D, probes, probe_c)
            if evaluator and crossed(config.metrics_ticks):
                row["metrics"] = evaluator(G_ema)
            alarms, unhealthy = monitor.look(row)
            for alarm in alarms:
                progress.say(f"alarm: {alarm}")
            row |= {"rollbacks": notes} if notes else {}
            notes = []
            progress.tick(cur_nimg, row)
            if log:
                log.write_stats(row, cur_nimg)
            if unhealthy:  # told everywhere before
                raise unhealthy

        # Samples.
        if log and crossed(config.sample_ticks):
            log.write_samples(sample(G_ema, grid_z, grid_c, config), cur_nimg)

        # Checkpoint.
        if log and crossed(config.checkpoint_ticks):
            counters = {"step": step, "seconds": stats.seconds, "sizes": log.sizes()}
            counters["sampler"] = inputs.sampler.state_dict()
            counters["monitor"] = monitor.state_dict()
            counters["engine"] = engine_state(phases, ada, G_up, D_up)
            checkpoint.save(log.run, cur_nimg, config, parts, counters)

    progress.say(f"done: {log.run if log else None}")
    return log.run if log else None


def set_growth(growth: float, config: TrainConfig, *nets: Any) -> None:
    """Grows networks that grow."""
    if config.grows:
        for net in nets:
            net.set_growth(growth)


@torch.no_grad()
def sample(G: Any, z: Tensor, c: Tensor | None, config: TrainConfig) -> Tensor:
    """Images [N, C, H, W] of the full size, in pieces of a batch; small ones are enlarged."""
    conditions = [None] * len(z) if c is None else c.split(config.batch)
    images = [G(a, b) for a, b in zip(z.split(config.batch), conditions, strict=False)]
    return F.interpolate(torch.cat(images).float(), config.resolution)


def engine_state(phases: Phases, ada: Ada | None, G_up: Updater, D_up: Updater) -> dict[str, Any]:
    """What a checkpoint holds beside networks, optimizers and counters: plain numbers."""
    return {
        "pl_mean": phases.pl_mean.item(),
        "ada": ada.state_dict() if ada else None,
        "scaler_G": G_up.scaler.state_dict(),
        "scaler_D": D_up.scaler.state_dict(),
    }


def restore_engine(
    state: dict[str, Any], phases: Phases, ada: Ada | None, G_up: Updater, D_up: Updater
) -> None:
    """Goes on from what `engine_state` gave."""
    phases.pl_mean.fill_(state["pl_mean"])
    if ada:
        ada.load_state_dict(state["ada"])
    G_up.scaler.load_state_dict(state["scaler_G"])
    D_up.scaler.load_state_dict(state["scaler_D"])
