"""Make the table of views.md, and its plot, from benchmarks/accuracy/views.csv.

python -m benchmarks.accuracy.views_page              # prints the table
python -m benchmarks.accuracy.views_page --plot FILE  # draws it (needs matplotlib)
"""

import argparse
from pathlib import Path

import pandas as pd

from benchmarks.accuracy.views import BEYOND, CURVE, LONG, RESULTS, SHORT

_LAST, _BEST = "last_epoch_test_accuracy", "best_epoch_test_accuracy"


def results() -> pd.DataFrame:
    return pd.read_csv(RESULTS)


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Mean, deviation and count over seeds for each way and number of epochs, in per cent."""
    grouped = runs.groupby(["way", "epochs"])
    return pd.DataFrame(
        {
            "last": 100 * grouped[_LAST].mean(),
            "deviation": 100 * grouped[_LAST].std(),
            "best": 100 * grouped[_BEST].mean(),
            "runs": grouped.size(),
            "teacher_passes": grouped["teacher_passes"].first(),
        }
    )


def table(runs: pd.DataFrame) -> str:
    """A Markdown table: one row per way; per budget the accuracy of the last and of the best epoch,
    and the teacher passes. A cell without a run is empty."""
    cells = summary(runs)
    lines = [
        "| Way | " + " | ".join(f"{e} epochs: last | best | passes" for e in (SHORT, LONG)) + " |",
        "|---|" + "---|" * 6,
    ]
    for way in CURVE | BEYOND:
        line = [way]
        for epochs in (SHORT, LONG):
            if (way, epochs) not in cells.index:
                line += ["", "", ""]
                continue
            cell = cells.loc[(way, epochs)]
            spread = f" ± {cell['deviation']:.2f}" if cell["runs"] > 1 else ""
            line.append(f"{cell['last']:.2f}{spread} ({cell['runs']:.0f})")
            line += [f"{cell['best']:.2f}", f"{cell['teacher_passes']:,.0f}"]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def plot(runs: pd.DataFrame, path: Path) -> None:
    """Plot accuracy of the last epoch against the number of exact views, between the labels alone
    and the live teacher; every run is a dot."""
    import matplotlib  # noqa: PLC0415  (of the extra `bench`)

    matplotlib.use("svg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    matplotlib.rcParams["svg.hashsalt"] = "views"  # equal tables give equal bytes
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, epochs in zip(axes, (SHORT, LONG), strict=True):
        runs_here = runs[runs["epochs"] == epochs].assign(accuracy=lambda r: 100 * r[_LAST])
        exact = runs_here[runs_here["way"].str.fullmatch(r"\d+ exact")]
        exact = exact.assign(views=exact["way"].str.split().str[0].astype(int))
        means = exact.groupby("views")["accuracy"].mean()
        axis.plot(means.index, means, color="C0", label="exact views")
        axis.scatter(exact["views"], exact["accuracy"], s=12, color="C0")
        for colour, way in (("C7", "labels only"), ("C1", "1 clean view, inexact"),
                            ("C2", "live teacher")):  # fmt: skip
            level = runs_here.loc[runs_here["way"] == way, "accuracy"].mean()
            axis.axhline(level, color=colour, linestyle="--", label=way)
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axis.set(title=f"{epochs} epochs", xlabel="cached views", ylabel="test accuracy, %")
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.accuracy.views_page")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="an SVG to write")
    file = parser.parse_args().plot
    if file:
        plot(results(), file)
    else:
        print(table(results()))


if __name__ == "__main__":
    main()
