"""The file to ship, under a path that does not depend on which file it is: for `dvc artifacts get`,
registries and deployment scripts."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.comparison.compare import ModelMetrics
from pipeline.comparison.decision import Decision
from pipeline.runtime.files import atomic_directory, read_json, write_json

CHOSEN = Path("models/chosen")
FILE = CHOSEN / "classifier.onnx"
CARD = FILE.with_suffix(".json")


def write_chosen(decision: Decision | None, models: Sequence[ModelMetrics]) -> None:
    """Write the folder: a copy of the file, and its model card with the copy's name.

    If there is no file to ship, the folder holds a card that says why, and no file: a file of an
    earlier comparison must not ship.

    Args:
        models: of the comparison.
    """
    with atomic_directory(CHOSEN) as folder:
        if decision is None:
            reasons = {f"{m.name}, {m.role}, {m.precision}": m.no_file for m in models}
            write_json(folder / CARD.name, {"no_file": reasons})
            return
        chosen = Path(decision.file.path)
        shutil.copyfile(chosen, folder / FILE.name)
        card = read_json(chosen.with_suffix(".json"), produced_by="dvc repro")
        card["file"]["name"] = FILE.name
        write_json(folder / CARD.name, card)
