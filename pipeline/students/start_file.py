"""The file or folder of weights that a student starts from, and its digest in params.yaml.

The digest is the file's identity for DVC: it depends on params.yaml, and never on the file.
"""

from pathlib import Path

from pipeline.models.params import WeightsFile
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import sha256_of_file
from pipeline.runtime.outputs import ModelOutputs
from pipeline.runtime.params import PARAMS_FILE, student_names

DESCRIPTION = "network.json"  # of a network that this pipeline wrote; it names the weights' hash


def check_start_file(weights: WeightsFile, name: str) -> None:
    """Check that the weights are there, and are those of the digest.

    Args:
        name: the student's.

    Raises:
        UserError: they are absent, are others, are what the student's own stages write, or
            params.yaml has no digest of them; says what to set.
    """
    path, key = Path(weights.path), f"{PARAMS_FILE}: students.{name}.network.weights"
    own = [ModelOutputs(role, name).model for role in ("distilled", "baseline")]
    if any(path.resolve().is_relative_to(folder.resolve()) for folder in own):
        raise UserError(
            f"`{key}.path` is `{path}`, which the student's own training replaces; expected "
            "weights from elsewhere. Copy them to `models/imported/`, and name the copy."
        )
    if path.name == "weights.safetensors" and (path.parent / DESCRIPTION).is_file():
        raise UserError(
            f"`{key}.path` is `{path}`, the weights alone of a network that this pipeline wrote; "
            f"expected its folder. Set `path: {path.parent}`."
        )
    described = path / DESCRIPTION if path.is_dir() else path
    if not described.is_file():
        expected = f" (SHA-256 {weights.sha256})" if weights.sha256 else ""
        raise UserError(
            f"`{described}`, from which student `{name}` starts, is absent; expected the "
            f"weights{expected}. {_remedy(path)}"
        )
    found = sha256_of_file(described)
    if weights.sha256 is None:
        raise UserError(
            f"`{key}.sha256` is missing; expected the SHA-256 of `{described}`, so that other "
            f"weights train the student again. Add `sha256: {found}`."
        )
    if weights.sha256 != found:
        raise UserError(
            f"`{described}` has the SHA-256 {found}, but `{key}.sha256` is {weights.sha256}; "
            "expected the same weights. Restore them, or, to train the student and its baseline "
            f"from these, set `sha256: {found}`."
        )


def _remedy(path: Path) -> str:
    match path.parts:
        case ("models", "students" | "baselines" as folder, other) if other in student_names():
            return f"Run `dvc repro {folder.removesuffix('s')}@{other}`."
        case ("models", "teacher"):
            return "Run `dvc repro teacher`."
    return "Put them there; if DVC tracks them, run `dvc pull`."
