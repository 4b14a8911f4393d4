"""The history of a training: a row per epoch, in a CSV file for `dvc plots` and the comparison.

It is written anew after each epoch, so that plots move while the training runs. Until the end no
row is `kept`: so the comparison tells a history that a killed training left from a whole one.
"""

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.runtime.files import write_bytes

#: `view`: of the epoch's first sample. `train_loss`: the mean over the epoch's samples, each before
#: its step. `learning_rate`: of the epoch's last step. `validation_nll` is in nats. `kept`: whether
#: the epoch's weights are the network's.
COLUMNS = (
    *("epoch", "view", "train_loss", "learning_rate", "validation_accuracy", "validation_nll"),
    "kept",
)


def write_history(
    path: Path, epochs: Iterable[Mapping[str, float]], kept_epoch: int | None = None
) -> None:
    """Write the figures of every epoch; the header alone for a network that was not trained.

    Args:
        kept_epoch: counted from 1; None while the training runs.
    """
    content = io.StringIO()
    writer = csv.DictWriter(content, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**figures, "kept": figures["epoch"] == kept_epoch} for figures in epochs)
    write_bytes(path, content.getvalue().encode())
