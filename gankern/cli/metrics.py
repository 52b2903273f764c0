"""`gankern metrics`: how good generated images are, beside the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gankern.cli.parameters import progress_bar

if TYPE_CHECKING:
    from gankern.data import Dataset
    from gankern.metrics.features import Features, Images
    from gankern.metrics.measure import Figure, Measurement

MOST = 50000  # generated images, unless asked for more
SHOWN = 10  # samples in the picture of neighbours
NEIGHBOURS = 7


@click.command()
@click.argument("source", metavar="RUN|FOLDER", type=click.Path(path_type=Path))
@click.option(
    "--data",
    metavar="DATA",
    help="Real images: digits, or a packed file.  [default: that of the run]",
)
@click.option(
    "--extractor",
    "spec",
    default="efficientnet-lite0",
    show_default=True,
    metavar="NAME|FILE",
    help="efficientnet-lite0 (embedded); or a file: the Inception of FID (TorchScript or a state"
    " dict), or any TorchScript network.",
)
@click.option(
    "--images",
    type=click.IntRange(8),
    help="Generated images.  [default: as many as real ones, at most 50,000]",
)
@click.option(
    "--real", type=click.IntRange(8), help="Real images, chosen at random.  [default: all]"
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the first generated image, and of random choices.",
)
@click.option(
    "--infinity/--no-infinity",
    default=True,
    show_default=True,
    help="Extrapolate the Fréchet distance to infinitely many images.",
)
@click.option("--paths", is_flag=True, help="Also path length and smoothness of interpolations.")
@click.option(
    "--modes",
    is_flag=True,
    help="Also the 1,000 modes of stacked digits; of gray ones, three images are a stack.",
)
@click.option(
    "--neighbours",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="PNG",
    help="Write samples, each beside the real images nearest to it.  [default: none]",
)
@click.option(
    "--classes/--no-classes",
    default=True,
    show_default=True,
    help="Figures of each class, if both sides have labels.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON instead of a table.")
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for features of real images.  [default: ~/.cache/gankern/features]",
)
@click.option("--no-cache", is_flag=True, help="Neither read nor write features.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, or auto: CUDA if there is.",
)
@click.option(
    "--batch", type=click.IntRange(1), default=64, show_default=True, help="Images at a time."
)
def command(
    source: Path,
    data: str | None,
    spec: str,
    images: int | None,
    real: int | None,
    seed: int,
    infinity: bool,
    paths: bool,
    modes: bool,
    neighbours: Path | None,
    classes: bool,
    as_json: bool,
    cache: Path | None,
    no_cache: bool,
    device: str,
    batch: int,
) -> None:
    """Compare the images of RUN (or of a FOLDER, zip or packed file) with real ones.

    RUN is a run folder or a generator's .safetensors file. Under torchrun, processes share the
    images. Figures are called FID, KID and IS only with the Inception network of FID.
    """
    from gankern.data import open_dataset
    from gankern.metrics import DatasetImages, extract, load_extractor, measure, path_figures
    from gankern.metrics.features import default_cache
    from gankern.training.distributed import choose_device, process_group

    folder = None if no_cache else cache or default_cache()
    on = choose_device(device)
    with process_group(on) as (rank, _):
        G, trained_on = open_generator(source, on)
        if data is None and trained_on is None:
            raise click.UsageError("--data must be given with a folder of images")
        if paths and G is None:
            raise click.UsageError("--paths needs a generator, and this is a set of images")
        dataset = open_dataset(data or trained_on or "")
        extractor = load_extractor(spec, on)
        real_images = DatasetImages(dataset, real, seed)
        count = images or min(len(real_images), MOST)
        fake_images = open_images(source, G, dataset, count, real_images.labels, seed)
        with progress_bar("real images") as bar:
            found_real = extract(real_images, extractor, batch, folder, bar)
        with progress_bar("generated images") as bar:
            found_fake = extract(fake_images, extractor, batch, folder, bar)
        if rank:
            return
    names = dataset.class_names if classes else None
    result = measure(found_real, found_fake, extractor, names, infinity, seed)
    if names and not result.classes:
        why = "of none are there 8 images"
        if found_fake.labels is None:
            why = f"{source} has no labels (a folder has, if its folders are named as the classes)"
        click.echo(f"no figures of each class: {why}", err=True)
    if paths and G is not None:
        with progress_bar("paths") as bar:
            result.figures += path_figures(
                G, extractor, min(batch, 16), seed, fake_images.labels, bar
            )
    if modes:
        result.figures += mode_figures(fake_images, batch)
    if neighbours:
        save_neighbours(neighbours, real_images, fake_images, found_real, found_fake)
    if as_json:
        click.echo(json.dumps({"source": str(source), "data": dataset.name, **result.to_json()}))
    else:
        click.echo(table(result))
        if neighbours:
            click.echo(f"{neighbours}: samples, each with the {NEIGHBOURS} real images nearest it")


def open_generator(source: Path, device: Any) -> tuple[Any, str | None]:
    """The generator of a run or a file and its data set; None and None for images."""
    from gankern.data import DataError, open_dataset
    from gankern.training import load_generator

    if source.suffix == ".safetensors" and source.is_file():
        try:
            open_dataset(source)
            return None, None
        except DataError:
            pass
    elif not ((source / "config.json").is_file() or (source / "G_ema.safetensors").is_file()):
        return None, None
    G, config = load_generator(source)
    return G.to(device), config.data


def open_images(
    source: Path, G: Any, dataset: Dataset, count: int, labels: Any, seed: int
) -> Images:
    """What is measured: a generator's images, those of a packed file, or those of a folder."""
    import numpy as np

    from gankern.data import open_dataset
    from gankern.metrics import DatasetImages, FolderImages, GeneratedImages, MetricsError

    images: GeneratedImages | DatasetImages
    if G is not None:
        images = GeneratedImages(G, count, labels, seed)
        got = list(images.batch(np.array([0])).shape[1:])
    elif source.suffix == ".safetensors":
        packed = open_dataset(source)
        images, got = DatasetImages(packed, count, seed), list(packed.images.shape[1:])
    else:
        return FolderImages(source, dataset, count)
    wanted = list(dataset.images.shape[1:])
    if got != wanted:
        raise MetricsError(f"{source}: images must be {wanted} as the real ones, got {got}")
    return images


def mode_figures(images: Images, batch: int) -> list[Figure]:
    """Modes of stacked digits among the images."""
    import numpy as np
    import torch

    from gankern.metrics import digits_classifier
    from gankern.metrics.measure import Figure
    from gankern.metrics.modes import MODES, as_stacks, is_gray, mode_coverage, read_digits

    classifier = digits_classifier.train_classifier()
    gray = is_gray(images.batch(np.arange(min(batch, len(images)))))
    with progress_bar("modes") as bar:
        digits = []
        for start in range(0, len(images), batch):
            index = np.arange(start, min(start + batch, len(images)))
            digits.append(read_digits(classifier, as_stacks(images.batch(index), gray)))
            bar(int(index[-1]) + 1, len(images))
    found = mode_coverage(torch.cat(digits))
    return [
        Figure(
            "modes",
            f"modes of {MODES:,} stacked digits",
            found.modes,
            better="higher",
            note=f"{found.n} stacks, of which the data has {found.expected_modes:.0f} modes;"
            f" the classifier is right on {classifier.accuracy:.1%}",
        ),
        Figure(
            "modes_kl",
            "KL of the modes from uniform, nats",
            found.kl,
            note=f"{found.expected_kl:.4f} for as many stacks of the data itself",
        ),
    ]


def save_neighbours(
    path: Path, real: Images, fake: Images, real_features: Features, fake_features: Features
) -> None:
    """A row a sample: the sample, then its nearest real images."""
    import numpy as np
    import torch

    from gankern.data.grid import save_grid
    from gankern.metrics.manifold import nearest

    count = min(SHOWN, len(fake))
    _, index = nearest(fake_features.features[:count], real_features.features, NEIGHBOURS)
    rows = [
        torch.cat([fake.batch(np.array([i])), real.batch(near.numpy())])
        for i, near in enumerate(index)
    ]
    captions = [text for i in range(count) for text in (f"#{i}", *map(str, index[i].tolist()))]
    save_grid(torch.cat(rows), path, rows[0].shape[0], captions)


def table(result: Measurement) -> str:
    """The figures as text."""
    lines = [
        f"{result.n_fake:,} generated and {result.n_real:,} real images,"
        f" features of {result.extractor}"
    ]
    if result.small:
        lines.append("few images: read the kernel distance, recall and coverage first")
    width = max(len(figure.label) for figure in result.figures)
    for figure in result.figures:
        value = f"{figure.value:.5g}"
        error = "" if figure.error is None else f"± {figure.error:.2g}"
        note = f"{figure.better}{'; ' + figure.note if figure.note else ''}"
        lines.append(f"  {figure.label:<{width}}  {value:>10} {error:<10}  {note}")
    if result.classes:
        labels = [figure.label for figure in next(iter(result.classes.values()))]
        lines.append("Each class")
        width = max(map(len, [*result.classes, ""]))
        lines.append(f"  {'':<{width}}  " + "  ".join(labels))
        for name, figures in result.classes.items():
            cells = (
                f"{figure.value:>{len(label)}.4g}"
                for figure, label in zip(figures, labels, strict=False)
            )
            lines.append(f"  {name:<{width}}  " + "  ".join(cells))
    return "\n".join(lines)
