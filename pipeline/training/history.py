"""The history of a training: a row per epoch, in a CSV file for `dvc plots` and the comparison."""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.runtime.files import write_bytes

#: `view`: of the epoch's first sample. `train_loss`: the mean over the epoch's samples, each before
#: its step. `learning_rate`: of the epoch's last step. `validation_nll` is in nats.
COLUMNS = ("epoch", "view", "train_loss", "learning_rate", "validation_accuracy", "validation_nll")


def write_history(path: Path, epochs: Iterable[Mapping[str, float]]) -> None:
    """Write the figures of every epoch; the header alone for a network that was not trained."""
    content = io.StringIO()
    writer = csv.DictWriter(content, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(epochs)
    write_bytes(path, content.getvalue().encode())
