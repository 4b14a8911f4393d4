"""The study of seeds computes intervals as the report does, and its tables from its files."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.accuracy import seeds
from pipeline.comparison.measurement import statistics
from pipeline.comparison.measurement.seeds import seed_mean


def test_the_intervals_of_a_subset_are_those_of_its_own_seeds():
    rng, chosen = np.random.default_rng(0), [0, 2, 3]
    shares = {seeds.BASELINE: 0.3, "KD": 0.4, "DIST": 0.5}
    correct = {method: rng.random((4, 200)) < share for method, share in shares.items()}
    found = seeds.intervals(correct, seeds=[5, 6, 7, 8])
    assert len(found) == 2 * (4 + 3 * (4 + 1))  # one seed has no interval over seeds
    found = found.set_index(["method", "seeds", "interval_over"])[["gain", "low", "high"]]

    gains = (correct["DIST"].astype(float) - correct[seeds.BASELINE])[chosen]  # [3, 200]
    expected = seed_mean(gains.mean(1), statistics.bootstrap_means(gains.T))
    row = found.loc["DIST", "5 7 8", "seeds and images"]
    assert row.tolist() == pytest.approx([expected.mean, *expected.interval])
    row = found.loc["DIST", "5 7 8", "seeds alone"]
    half = 4.302653 * gains.mean(1).std(ddof=1) / 3**0.5  # Student's t with 2 degrees of freedom
    mean = expected.mean
    assert row.tolist() == pytest.approx([mean, mean - half, mean + half])
    row = found.loc["DIST", "7", "images alone"]
    bounds = statistics.interval(statistics.bootstrap_means(gains[1][:, None]))[:, 0]
    assert row.tolist() == pytest.approx([gains[1].mean(), *bounds])


def test_the_tables_count_the_intervals_that_cover_the_mean_of_all_seeds(tmp_path):
    accuracies = {seeds.BASELINE: (0.30, 0.32), "KD": (0.40, 0.42), "DIST": (0.50, 0.52)}
    pd.DataFrame(
        [(name, seed, value) for name in accuracies for seed, value in enumerate(accuracies[name])],
        columns=["method", "seed", "test_accuracy"],
    ).to_csv(tmp_path / seeds.ACCURACIES, index=False)
    pd.DataFrame(
        [
            ("KD", 1, "0", "images alone", 0.10, 0.09, 0.11),
            ("KD", 1, "1", "images alone", 0.15, 0.13, 0.17),
            ("KD", 2, "0 1", "seeds and images", 0.10, 0.05, 0.15),
        ],
        columns=["method", "num_seeds", "seeds", "interval_over", "gain", "low", "high"],
    ).to_csv(tmp_path / seeds.INTERVALS, index=False)
    gains, coverage = seeds.tables(tmp_path)
    assert "| labels only | 31.00 ± 1.41 |  |" in gains
    assert "| KD | 41.00 ± 1.41 | +10.00 (+5.00 to +15.00) |" in gains
    assert coverage.splitlines()[2:] == ["| KD | 1 | images alone | 1 of 2 (50.0%) | 1 | 1.50 |"]
