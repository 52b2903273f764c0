"""`gankern project`: an image into the styles of a trained generator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gankern.cli.parameters import progress_bar, require_classes, usable_device


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("image", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write to.  [default: RUN/projected]",
)
@click.option(
    "--steps", type=click.IntRange(1), default=500, show_default=True, help="Steps of Adam."
)
@click.option("--lr", type=float, default=0.1, show_default=True, help="Its learning rate.")
@click.option(
    "--class",
    "wanted",
    type=click.IntRange(0),
    help="Class number to start from.  [default: between all classes]",
)
@click.option("--per-layer", is_flag=True, help="A style for each layer (W+) instead of one.")
@click.option("--noise/--no-noise", default=True, show_default=True, help="Optimise noise, too.")
@click.option(
    "--features",
    type=click.Choice(["pixels", "discriminator"]),
    default="pixels",
    show_default=True,
    help="Distance: of pixels alone, or also of the logit's inputs in the run's discriminator.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of latents and noise, and of the condition if conditions are vectors.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, or auto: CUDA if there is.",
)
def command(
    run: Path,
    image: Path,
    out: Path | None,
    steps: int,
    lr: float,
    wanted: int | None,
    per_layer: bool,
    noise: bool,
    features: str,
    seed: int,
    device: str,
) -> None:
    """Find styles of RUN (stylegan or stylegan2) whose image is near to IMAGE.

    Writes projected.png (the image, and what was found) and projected.safetensors (ws, image).
    """
    import safetensors.torch
    import torch

    from gankern.data.files import atomic_path
    from gankern.data.grid import save_grid
    from gankern.training import load_generator
    from gankern.training.project import project

    G: Any
    on = usable_device(device)
    G, config = load_generator(run)
    c = start(config, wanted, seed)
    c = None if c is None else c.to(on)
    G = G.to(on)
    target = read_image(image, config.channels, config.resolution)
    distance = discriminator_features(run, c, on) if features == "discriminator" else None
    with progress_bar("projecting") as bar:
        found = project(
            G, target, steps, lr, c, distance, per_layer=per_layer, optimise_noise=noise,
            seed=seed, progress=bar,
        )  # fmt: skip
    out = out or (run if run.is_dir() else run.parent) / "projected"
    save_grid(torch.cat([target, found.image.cpu()]), out / "projected.png", 2)
    with atomic_path(out / "projected.safetensors") as path:
        tensors = {"ws": found.ws.cpu(), "image": found.image.cpu()}
        safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, path)
    click.echo(
        f"{out / 'projected.png'}: distance {found.distances[0]:.4f} to {found.distances[-1]:.4f}"
        f" in {steps} steps"
    )


def start(config: Any, wanted: int | None, seed: int) -> Any:
    """The condition [1, c_dim] whose average style is the start; None without conditions."""
    import torch

    from gankern.training.load import seed_vectors

    count = config.c_dim
    if wanted is not None:
        require_classes(count, config.label_dim)
        if wanted >= count:
            raise click.UsageError(f"--class must be in 0..{count - 1}, got {wanted}")
        return torch.eye(count)[wanted : wanted + 1]
    if not count:
        return None
    if config.label_dim:
        return seed_vectors(config, [seed])
    return torch.full((1, count), 1 / count)  # between all classes


def read_image(path: Path, channels: int, resolution: tuple[int, int]) -> Any:
    """An image file as [1, C, H, W] in [-1, 1], cropped to the centre and scaled."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    try:
        picture = Image.open(path).convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    except OSError as error:
        reason = error.strerror or "not an image that can be read"
        raise click.UsageError(f"{path}: {reason}") from None
    height, width = resolution
    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(fitted, dtype=np.float32).reshape(height, width, channels)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None] / 127.5 - 1


def discriminator_features(run: Path, c: Any, device: str) -> Any:
    """Images to the inputs of the last layer of the run's discriminator, of unit length.

    Args: the run; c, conditions [1, c_dim] of the images or None; device of the discriminator.
    """
    import torch.nn.functional as F

    from gankern import models
    from gankern.training.checkpoint import load_checkpoint, load_module
    from gankern.training.run import read_config

    config = read_config(run)
    saved = load_checkpoint(run, names=("D",))
    if saved is None:
        raise click.UsageError(f"{run}: no checkpoint yet")
    D = models.build(config)[1].eval().requires_grad_(False)
    load_module(D, saved.tensors["D"], saved.folder / "D.safetensors")
    D = D.to(device)
    seen: dict[str, Any] = {}
    last: Any = D.b4.out if hasattr(D, "b4") else D.epilogue.out  # type: ignore[union-attr]
    last.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))

    def features(img: Any) -> Any:
        D(img, c)
        return F.normalize(seen["x"], dim=1)

    return features
