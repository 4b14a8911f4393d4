"""How often does the interval of a gain over seeds and images cover the true gain?

    python -m benchmarks.seed_intervals [--repeats 1000]

Simulated students and baselines on simulated test images, whose true gain is known exactly. A test
image has a difficulty, of which all networks share one part and the trainings of one kind another;
a training has an ability, which its seed moves; and each training errs on images of its own. Prints
the share of 95 % intervals that cover the truth and, in brackets, their median half-width in
points, by number of test images, of seeds, and by how much a seed moves an accuracy: of
`seed_mean`, and of the two that are often seen: over images alone, from the mean over seeds, and
over seeds alone, by Student's t.
"""

from pipeline.runtime.command import run_command

import argparse
from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.stats import norm, t

from pipeline.comparison.measurement.seeds import SeedMean

IMAGES, SEEDS = (500, 2500, 10_000), (1, 2, 3, 5, 10)
DEVIATIONS = (0.0, 0.5, 1.0, 2.0)  # points of accuracy, between the seeds of one training
ACCURACIES = 0.72, 0.70  # of the student and its baseline, about
#: Deviations between images, in deviations of a training's own errors: of what all networks share,
#: and of what students or baselines share.
SHARED, OF_KIND = 1.5, 0.7
SEED = 0


def trainings(
    accuracy: float, deviation: float, difficulty: np.ndarray, seeds: int, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Simulate whether each training classifies each image correctly: [S, N] bool; and its true
    accuracy over all seeds and images."""
    spread = np.sqrt(SHARED**2 + OF_KIND**2 + 1)
    ability = spread * norm.ppf(accuracy)
    moved = deviation / 100 / norm.pdf(norm.ppf(accuracy)) * spread
    abilities = ability + moved * rng.standard_normal((seeds, 1))
    of_kind = OF_KIND * rng.standard_normal(len(difficulty))
    errors = rng.standard_normal((seeds, len(difficulty)))
    return difficulty + of_kind + errors < abilities, norm.cdf(ability / np.hypot(spread, moved))


def mean_over_seeds(gains: np.ndarray) -> SeedMean:
    """As `seed_mean`, with the variances that its resampling estimates: from [S, N] gains."""
    seeds, images = gains.shape
    of_mean, of_one = gains.mean(0).var() / images, gains.var(1).mean() / images
    rest = max(0.0, (of_one - of_mean) / (seeds - 1))
    figures = gains.mean(1)
    return SeedMean(
        mean=figures.mean(),
        deviation=figures.std(ddof=1),
        seeds=seeds,
        of_seeds=figures.var(ddof=1) / seeds,
        of_images=max(0.0, of_mean - rest),
        rest=rest,
    )


def intervals(gains: np.ndarray) -> Iterator[tuple[str, float, float]]:
    """Yield each interval's name and bounds, from [S, N] gains."""
    seeds, images = gains.shape
    mean, error = gains.mean(), np.sqrt(gains.mean(0).var() / images)
    half = norm.isf(0.025) * error
    yield "images alone", mean - half, mean + half
    if seeds > 1:
        half = t.isf(0.025, seeds - 1) * gains.mean(1).std(ddof=1) / np.sqrt(seeds)
        yield "seeds alone", mean - half, mean + half
        yield "seeds and images", *mean_over_seeds(gains).interval


def simulate(repeats: int) -> pd.DataFrame:
    rng = np.random.default_rng(SEED)
    rows = []
    for images in IMAGES:
        for deviation in DEVIATIONS:
            for seeds in SEEDS:
                for _ in range(repeats):
                    difficulty = SHARED * rng.standard_normal(images)
                    (student, high), (baseline, low) = (
                        trainings(accuracy, deviation, difficulty, seeds, rng)
                        for accuracy in ACCURACIES
                    )
                    for name, lower, upper in intervals(student.astype(float) - baseline):
                        covers = lower <= high - low <= upper
                        half = 50 * (upper - lower)
                        rows.append((images, deviation, seeds, name, covers, half))
    columns = ["test images", "seed moves, points", "seeds", "interval", "covers", "half-width"]
    table = pd.DataFrame(rows, columns=columns)
    return table.groupby(columns[:4], sort=False).agg({"covers": "mean", "half-width": "median"})


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.seed_intervals", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--repeats", type=int, default=1000, help="simulations of each row")
    table = simulate(parser.parse_args().repeats)
    shown = table.apply(lambda row: f"{row['covers']:.1%} ({row['half-width']:.2f})", axis=1)
    print(shown.unstack("interval").fillna("").reset_index().to_markdown(index=False))


if __name__ == "__main__":
    run_command(main)
