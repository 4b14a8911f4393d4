"""Find the results of students that params.yaml no longer defines.

They stay when a student is removed: DVC forgets a stage that dvc.yaml no longer has, and leaves its
outputs. The comparison leaves them out.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.runtime.outputs import ExportedFile, ExportOutputs, ModelOutputs
from pipeline.runtime.params import read_params

REMOVE = "python -m pipeline.commands.remove_results"
_ANY = "*"


def results_of_removed_students(names: Sequence[str]) -> dict[str, list[Path]]:
    """Find, by removed student, the files and folders that its stages wrote. (Not its trainings in
    .scratch/.)

    Args:
        names: of the students that params.yaml defines.
    """
    found: dict[str, list[Path]] = {}
    needed = _weights_that_students_start_from()
    for pattern in _places():
        for path in sorted(pattern.parent.glob(pattern.name)):
            name = path.name.removesuffix(pattern.suffix)
            is_result = path.is_file() if pattern.suffix else path.is_dir()
            if path.resolve() in needed:
                continue
            if is_result and name not in names and not name.startswith("."):
                found.setdefault(name, []).append(path)
    return dict(sorted(found.items()))


def _weights_that_students_start_from() -> set[Path]:
    """The files and folders of weights in params.yaml, and the folders above them."""
    needed = set()
    for student in read_params()["students"].values():
        network = student.get("network") if isinstance(student, Mapping) else None
        weights = network.get("weights") if isinstance(network, Mapping) else None
        if isinstance(weights, Mapping) and isinstance(weights.get("path"), str):
            path = Path(weights["path"]).resolve()
            needed |= {path, *path.parents}
    return needed


def _places() -> Iterator[Path]:
    """The paths that the stages of a student write, with a pattern for its name."""
    for role in ("distilled", "baseline"):
        model, file = ModelOutputs(role, _ANY), ExportedFile(role, _ANY)
        yield from (model.model, model.metrics, model.history, model.predictions)
        yield from (file.path, file.card)
    yield ModelOutputs("distilled", _ANY).int8_model
    outputs = ExportOutputs(_ANY)
    yield ExportedFile("distilled", _ANY, "int8").path.parent
    yield outputs.seed_folder
    yield from (outputs.metrics, outputs.predictions, outputs.corrupted_predictions)


def removed_students_line(names: Sequence[str]) -> str | None:
    """A line that names the removed students whose results are still there; None without any."""
    if not (removed := results_of_removed_students(names)):
        return None
    return (
        f"left out, because params.yaml no longer defines them: {', '.join(removed)}. `{REMOVE}` "
        "lists and removes their results."
    )
