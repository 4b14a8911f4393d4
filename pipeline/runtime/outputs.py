"""The paths that one stage writes and others read, and the costs of a network in its metrics."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import NonNegativeInt

from pipeline.runtime.validation import Record

PREPARED = Path("data/prepared")
STORE = Path("data/soft_targets")

#: `distilled` and `baseline` are one student's network, trained with and without the teacher.
Role = Literal["teacher", "distilled", "baseline"]
#: Of an exported file. An int8 file holds weights and activations of 8 bits.
Precision = Literal["float32", "int8"]

#: A folder of trainings with other seeds, in that of the main one.
SEEDS = "seeds"

_STAGES: dict[Role, str] = {"teacher": "teacher", "distilled": "student", "baseline": "baseline"}


@dataclass(frozen=True)
class ModelOutputs:
    """The paths that the stage of one model writes."""

    role: Role
    name: str | None = None  # the student's; None for the teacher
    #: Of a training that is not the stage's main one, the best on validation; None: that one.
    seed: int | None = None

    @property
    def stage(self) -> str:
        """DVC's name of the stage: `teacher`, `student@NAME` or `baseline@NAME`."""
        return _STAGES[self.role] if self.name is None else f"{_STAGES[self.role]}@{self.name}"

    @property
    def model(self) -> Path:
        """The folder of the weights and of network.json."""
        folder = Path("models") / self._place
        return folder if self.seed is None else folder / SEEDS / str(self.seed)

    @property
    def other_seeds(self) -> list[int]:
        """The seeds of the trainings beside the main one, as the stage wrote them."""
        return numbered(self.model / SEEDS)

    @property
    def logits_key(self) -> str:
        """The prefix of `validation` and `test` in the names of its logits."""
        return "" if self.seed is None else f"{SEEDS}.{self.seed}."

    @property
    def metrics(self) -> Path:
        return Path("metrics") / f"{self._place}.json"

    @property
    def history(self) -> Path:
        return Path("metrics/history") / f"{self._place}.csv"

    @property
    def predictions(self) -> Path:
        return Path("predictions") / f"{self._place}.safetensors"

    @property
    def scratch(self) -> Path:
        """The folder of the state that the training resumes from."""
        return Path(".scratch/training") / self._place

    @property
    def int8_model(self) -> Path:
        """The folder that `int8_training` writes of a distilled student: a network, or why none."""
        return Path("models/int8") / str(self.name)

    @property
    def int8_source(self) -> Path:
        """The folder of the network that the int8 file is made of."""
        trained = self.role == "distilled" and (self.int8_model / "network.json").is_file()
        return self.int8_model if trained else self.model

    @property
    def int8_scratch(self) -> Path:
        """The folder of the state that `int8_training` resumes from."""
        return Path(".scratch/training/int8") / str(self.name)

    @property
    def _place(self) -> Path:
        return Path(self.role) if self.name is None else Path(f"{_STAGES[self.role]}s") / self.name


TEACHER = ModelOutputs("teacher")


def numbered(folder: Path) -> list[int]:
    """The numbers in a folder that are names of files or folders; none if it is absent."""
    names = {path.stem for path in folder.glob("*")} if folder.is_dir() else set()
    return sorted(int(name) for name in names if name.isdecimal())


#: Why there is no int8 file where params.yaml asks for none, in its model card.
NOT_ASKED = "`export.precision` is float32"


@dataclass(frozen=True)
class ExportedFile:
    """One network as an ONNX file, and its model card."""

    role: Role
    name: str | None = None  # the student's; None for the teacher
    precision: Precision = "float32"
    #: Of a training beside the main one, whose file is measured and does not ship.
    seed: int | None = None

    @property
    def path(self) -> Path:
        """The path of the file. There may be none: its card says why."""
        folder = Path("models/exported")
        if self.role == "teacher":
            return folder / "teacher/teacher.onnx"
        if self.seed is not None:
            return folder / SEEDS / self.name / self.role / f"{self.seed}.onnx"
        if self.precision == "int8":
            return folder / "int8" / self.name / f"{self.role}.onnx"
        return folder / ("baselines" if self.role == "baseline" else "") / f"{self.name}.onnx"

    @property
    def card(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def key(self) -> str:
        """Its name in the files that hold the predictions of several: `distilled.int8`."""
        own = "" if self.seed is None else f".{SEEDS}.{self.seed}"
        return f"{self.role}.{self.precision}{own}"


@dataclass(frozen=True)
class ExportOutputs:
    """The paths that the export of the teacher, or of one student and its baseline, writes, and
    those of the stage that runs these files on corrupted images."""

    name: str | None = None  # the student's; None for the teacher

    @property
    def stage(self) -> str:
        return "export_teacher" if self.name is None else f"export@{self.name}"

    @property
    def robustness_stage(self) -> str:
        return "robustness_teacher" if self.name is None else f"robustness@{self.name}"

    @property
    def files(self) -> list[ExportedFile]:
        """Every file that there can be, of the main trainings."""
        if self.name is None:
            return [ExportedFile("teacher")]
        return [
            ExportedFile(role, self.name, precision)
            for precision in get_args(Precision)
            for role in ("distilled", "baseline")
        ]

    @property
    def seed_folder(self) -> Path:
        """The folder of the files of other seeds than the main ones."""
        return Path("models/exported") / SEEDS / str(self.name)

    @property
    def seed_files(self) -> list[ExportedFile]:
        """The files of other seeds that there are."""
        return [
            ExportedFile(role, self.name, seed=seed)
            for role in ("distilled", "baseline")
            for seed in numbered(self.seed_folder / role)
        ]

    @property
    def metrics(self) -> Path:
        return Path("metrics/export") / f"{self._place}.json"

    @property
    def predictions(self) -> Path:
        """Logits of the files, on validation and test."""
        return Path("predictions/exported") / f"{self._place}.safetensors"

    @property
    def corrupted_predictions(self) -> Path:
        return Path("predictions/robustness") / f"{self._place}.safetensors"

    @property
    def _place(self) -> Path:
        return Path("teacher") if self.name is None else Path("students") / self.name


class NetworkCosts(Record, extra="ignore"):
    """What a network costs, as its stage writes it to metrics/*.json beside its accuracy."""

    parameters: NonNegativeInt
    macs: NonNegativeInt  # of one image
    size_bytes: NonNegativeInt  # of its weights


class Start(Record):
    """The weights that the training of a student or a baseline started from."""

    text: str  # `from scratch`, `published weights, new last layer`
    sha256: str  # of all tensors, before the first step
    seed: int | None = None  # of the training; None of one that did not record it
