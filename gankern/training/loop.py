"""The training loop."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import torch
import torch.nn.functional as F

from gankern import models
from gankern.data import BatchSampler, Dataset, open_dataset
from gankern.training import checkpoint
from gankern.training.config import TrainConfig, TrainError
from gankern.training.distributed import average_gradients, choose_device, process_group
from gankern.training.ema import update_ema
from gankern.training.losses import LOSSES
from gankern.training.noise import derive_seed, latents, one_hot_classes
from gankern.training.progress import Progress
from gankern.training.run import RunLog, create_run
from gankern.training.stats import TickStats


def open_data(config: TrainConfig) -> Dataset:
    """Opens the data set of a configuration, and writes the images' size into the latter."""
    dataset = open_dataset(config.data)
    config.resolution = dataset.resolution
    config.channels = dataset.channels
    config.num_classes = dataset.num_classes
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
    with process_group(device) as (rank, world), contextlib.ExitStack() as stack:
        return _train(config, resume, device, rank, world, stack)


def _train(
    config: TrainConfig, resume: Path | None, device: torch.device, rank: int, world: int,
    stack: contextlib.ExitStack,
) -> Path | None:  # fmt: skip
    # Data.
    if config.batch % world:
        raise TrainError(f"--batch must be a multiple of {world} processes, got {config.batch}")
    dataset = open_data(config)
    sampler = BatchSampler(len(dataset), config.batch, config.seed, rank, world)

    # Networks, the same in every process.
    torch.manual_seed(derive_seed(config.seed, "weights"))
    G, D = (net.train().to(device) for net in models.build(config))
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    betas = (config.beta1, config.beta2)
    G_opt = torch.optim.Adam(G.parameters(), config.g_lr, betas, fused=True)
    D_opt = torch.optim.Adam(D.parameters(), config.d_lr, betas, fused=True)
    loss = LOSSES[config.loss]

    # Where an earlier process stopped.
    parts: checkpoint.Parts = {
        "G": G,
        "D": D,
        "G_ema": G_ema,
        "optimizer_G": G_opt,
        "optimizer_D": D_opt,
    }
    saved = checkpoint.load_checkpoint(resume) if resume else None
    cur_nimg, step, seconds = 0, 0, 0.0
    if saved:
        checkpoint.restore(saved, parts)
        sampler.load_state_dict(saved.state["sampler"])
        cur_nimg, step, seconds = (saved.state[name] for name in ("cur_nimg", "step", "seconds"))

    # The run folder and what is shown: the first process's work.
    log = None
    if rank == 0:
        run = resume or create_run(config, dataset.name)
        log = stack.enter_context(RunLog(run, config, saved.state["sizes"] if saved else {}))
    total, tick_nimg = round(config.kimg * 1000), round(config.tick_kimg * 1000)
    progress = stack.enter_context(Progress(total, cur_nimg, log.run if log else None))
    for line in saved.damaged if saved else []:
        progress.say(f"warning: {line}; going on from {cur_nimg / 1000} kimg")
    stats = TickStats(world, seconds)
    grid_z = latents(config.z_dim, config.grid**2, derive_seed(config.seed, "grid")).to(device)
    grid_c = None  # a column of the grid is a class
    if config.c_dim:
        classes = torch.arange(config.grid**2, device=device) % config.grid % config.c_dim
        grid_c = F.one_hot(classes, config.c_dim).float()

    def crossed(ticks: int) -> bool:
        """Whether the last step has completed a multiple of so many ticks, or the run."""
        nimg = ticks * tick_nimg
        return cur_nimg >= total or cur_nimg // nimg != (cur_nimg - config.batch) // nimg

    if log and not saved:
        log.write_samples(G_ema(grid_z, grid_c), cur_nimg)
    while cur_nimg < total:
        # The images and the noise of this step. Like dropout, they are functions of cur_nimg.
        torch.manual_seed(derive_seed(config.seed, "step", cur_nimg, rank))
        real, labels = dataset.batch(next(sampler), device)  # [N, C, H, W]
        real_c = None if labels is None else F.one_hot(labels, config.num_classes).float()
        real_c = real_c if config.c_dim else None  # [N, c_dim]
        z_D, z_G = (
            latents(config.z_dim, config.batch, derive_seed(config.seed, stream, cur_nimg))
            .chunk(world)[rank]
            .to(device)
            for stream in ("noise_D", "noise_G")
        )  # [N, z_dim]
        c_D, c_G = (
            c if c is None else c.chunk(world)[rank].to(device)
            for c in (
                one_hot_classes(config.c_dim, config.batch, derive_seed(config.seed, s, cur_nimg))
                for s in ("class_D", "class_G")
            )
        )  # [N, c_dim]

        # D: real images up, generated ones down.
        with torch.no_grad():
            fake = G(z_D, c_D)  # [N, C, H, W]
        D_opt.zero_grad()
        real_logits, fake_logits = D(real, real_c), D(fake, c_D)  # [N, 1]
        loss_D = loss.d(real_logits, fake_logits, config.label_smoothing)
        loss_D.backward()
        average_gradients(D, world)
        D_opt.step()

        # G: its images up.
        D.requires_grad_(False)
        G_opt.zero_grad()
        fake_logits_G = D(G(z_G, c_G), c_G)
        paired = (D(real, real_c),) if loss.pairs else ()
        loss_G = loss.g(fake_logits_G, *paired)
        loss_G.backward()
        average_gradients(G, world)
        G_opt.step()
        D.requires_grad_(True)

        # Moving average of G.
        update_ema(G_ema, G, config.batch, cur_nimg, config.ema_kimg * 1000, config.ema_rampup)

        # Counters and status.
        cur_nimg += config.batch
        step += 1
        stats.add(
            config.batch, loss_D=loss_D, loss_G=loss_G, logit_real=real_logits,
            logit_fake=fake_logits,
        )  # fmt: skip
        progress.step(cur_nimg)
        if crossed(ticks=1):
            row = {"kimg": cur_nimg / 1000, "step": step, "epoch": cur_nimg / len(dataset)}
            row |= stats.take(row["kimg"])
            progress.tick(cur_nimg, row)
            if log:
                log.write_stats(row, cur_nimg)

        # Samples.
        if log and crossed(config.sample_ticks):
            log.write_samples(G_ema(grid_z, grid_c), cur_nimg)

        # Checkpoint.
        if log and crossed(config.checkpoint_ticks):
            counters = {"step": step, "seconds": stats.seconds, "sampler": sampler.state_dict()}
            checkpoint.save(log.run, cur_nimg, config, parts, counters | {"sizes": log.sizes()})

    progress.say(f"done: {log.run if log else None}")
    return log.run if log else None
