"""Does a run generate digits? A classifier trained on real digits labels 2,000 of its images.

    python benchmarks/digits_quality.py RUN [--json]

Prints which fraction it recognises (probability of the best class at least 0.9), the same figure
for real digits that it has not seen, and the share of each class. Exit code 0 if at least 75 %
are recognised and every class has 3 to 20 %, 1 if not, 2 for wrong input.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

from gankern.data.latents import render, seed_classes, seed_latents
from gankern.metrics.digits_classifier import (
    CONFIDENT,
    DigitsClassifier,
    digit_quality,
    train_classifier,
)
from gankern.training import load_generator

LEAST_CONFIDENT = 0.75
SHARES = (0.03, 0.20)
LEAST_ACCURACY = 0.96  # below it, the classifier is no judge


def judge(classifier: DigitsClassifier, images: torch.Tensor) -> dict[str, Any]:
    """The figures of images [N, C, H, W] in [-1, 1], and whether they pass the bar."""
    quality = digit_quality(classifier, images)
    failures = []
    if quality["confident"] < LEAST_CONFIDENT:
        failures.append(f"confident {quality['confident']:.1%} < {LEAST_CONFIDENT:.0%}")
    for digit, share in enumerate(quality["shares"]):
        if not SHARES[0] <= share <= SHARES[1]:
            failures.append(f"share of {digit} {share:.1%} not in 3 to 20 %")
    if classifier.accuracy < LEAST_ACCURACY:
        failures.append(f"classifier's accuracy {classifier.accuracy:.1%} < {LEAST_ACCURACY:.0%}")
    return {
        "images": len(images),
        **quality,
        "real_confident": classifier.confident,
        "classifier_accuracy": classifier.accuracy,
        "failures": failures,
        "passed": not failures,
    }


def generate(run: str, count: int, first_seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images [N, C, H, W] of consecutive seeds, and the classes they were asked for, if any."""
    G: Any
    G, _ = load_generator(run)
    seeds = range(first_seed, first_seed + count)
    classes = seed_classes(seeds, G.c_dim) if G.c_dim else None
    return render(G, seed_latents(seeds, G.z_dim), classes, batch=100), classes


def show(result: dict[str, Any]) -> None:
    """Prints the figures for people."""
    print(f"classifier: {result['classifier_accuracy']:.1%} of 1,000 held-out real digits right")
    print(f"{'':24}{'generated':>10}{'real':>8}{'bar':>9}")
    generated, real = result["confident"], result["real_confident"]
    print(f"{f'probability >= {CONFIDENT}':24}{generated:10.1%}{real:8.1%}{'>= 75 %':>9}")
    for digit, share in enumerate(result["shares"]):
        print(f"{f'share of {digit}':24}{share:10.1%}{0.1:8.1%}{'3..20 %':>9}")
    if "labels_followed" in result:
        print(f"{'label followed':24}{result['labels_followed']:10.1%}")
    print("passed" if result["passed"] else "FAILED: " + "; ".join(result["failures"]))


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="run folder, or a generator's .safetensors file")
    parser.add_argument("--images", type=int, default=2000, help="generated digits (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (default 0)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args(arguments)
    if options.images < 1 or options.seed < 0:
        parser.error("--images must be at least 1 and --seed at least 0")
    start = time.perf_counter()
    try:
        images, classes = generate(options.run, options.images, options.seed)
        classifier = train_classifier()
    except (ValueError, OSError) as error:
        print(f"digits_quality: {error}", file=sys.stderr)
        return 2
    result = judge(classifier, images)
    if classes is not None and result["images"]:
        found = classifier.probabilities(images).argmax(1)
        result["labels_followed"] = (found == classes).float().mean().item()
    result["seconds"] = round(time.perf_counter() - start, 1)
    if options.json:
        print(json.dumps({"run": str(options.run), **result}))
    else:
        show(result)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
