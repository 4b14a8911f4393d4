"""Build every network of params.yaml, try it on random images, and read the files that params.yaml
names as weights or logits. `check` runs this.

python -m pipeline.commands.check_networks

It is a command of its own because torch takes seconds to import. It downloads nothing.
"""

from pipeline.runtime.command import run_command

import argparse
import ast
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from pipeline.data.prepared.dataset import Dataset, DatasetDescription
from pipeline.data.sources.params import DatasetParams
from pipeline.initial_weights.published import check_published
from pipeline.models.checkpoint import DESCRIPTION, NetworkFile
from pipeline.models.family import describe_failure, family_file, family_module
from pipeline.models.params import NetworkParams, WeightsFile
from pipeline.models.spec import InputSpec, ModelSpec, build, model_spec, native_input
from pipeline.named_files.reading import check_file
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import PREPARED
from pipeline.runtime.params import PARAMS_FILE, load_section, student_names
from pipeline.runtime.validation import read_model
from pipeline.students.params import load_student
from pipeline.teacher.params import TeacherParams
from pipeline.teacher.trial import check_evaluation, logits_of, two_images
from pipeline.views.params import ViewsParams

#: What every stage that builds a network depends on, beside the file of its family.
WATCHED = ("pipeline.runtime", "pipeline.data.prepared")


def problems() -> list[str]:
    """List every problem, in the file's order, after the key of the network."""
    lines: list[str] = []
    found: dict[str, str | None] = {}  # several students may have one network
    for key in ("teacher", *(f"students.{name}" for name in student_names())):
        problem = None
        try:
            spec, is_trained = described_network(key)
            if spec is not None:
                same = repr((spec, is_trained))
                if same not in found:
                    found[same] = problem_of(spec, is_trained=is_trained)
                problem = found[same]
        except UserError as error:
            problem = str(error)
        lines += [f"`{PARAMS_FILE}: {key}.network`: {problem}"] if problem else file_problems(key)
    return lines


def file_problems(key: str) -> list[str]:
    """List the problems of the file that the teacher, or a student, is or starts from."""
    try:
        check_file(key, described_dataset())
    except UserError as error:
        return str(error).splitlines()
    return []


def described_network(key: str) -> tuple[ModelSpec | None, bool]:
    """Return the spec that the stage of `teacher` or `students.NAME` builds, and whether it trains
    it. None if the network is a file, or there is none."""
    dataset = described_dataset()
    if key != "teacher":
        student = load_student(key.removeprefix("students."))
        dataset = dataset.resized(load_section(ViewsParams, "views").image_size)
        native = input_of_weights(student.family, student.network)
        return model_spec(student.family, student.network, dataset, native=native), True
    teacher = load_section(TeacherParams, "teacher")
    is_file = hasattr(family_module(teacher.family), "build_from_file")
    if teacher.weights == "logits" or (teacher.weights == "checkpoint" and is_file):
        return None, False
    native = None
    if teacher.weights == "pretrained":
        check_published(teacher.family)
        native = native_input(teacher.family, teacher.network.name, teacher.network.options)
    spec = model_spec(teacher.family, teacher.network, dataset, native=native)
    return spec, teacher.weights == "train"


def input_of_weights(family: str, network: NetworkParams) -> InputSpec | None:
    """The input of what a student starts from, if that is known without the weights."""
    if network.weights == "pretrained":
        check_published(family)
        return native_input(family, network.name, network.options)
    if isinstance(network.weights, WeightsFile) and Path(network.weights.path).is_dir():
        path = Path(network.weights.path) / DESCRIPTION
        return read_model(path, NetworkFile, produced_by="dvc repro").input
    return None


def described_dataset() -> Dataset:
    """The dataset of params.yaml without its images; with the classes that `prepare` found if it
    has run, else with two."""
    params = load_section(DatasetParams, "dataset")
    class_names = ["0", "1"]
    with suppress(UserError):
        path = PREPARED / "dataset.json"
        class_names = read_model(path, DatasetDescription, produced_by="-").class_names
    half = [0.5] * params.channels
    return Dataset("", class_names, params.channels, params.image_size, half, half, splits={})


def problem_of(spec: ModelSpec, *, is_trained: bool) -> str | None:
    """Say why a network cannot be built, evaluated or trained; None if it can."""
    torch.manual_seed(0)
    try:
        network = build(spec)
        check_imports(spec.family)
        check_evaluation(network, spec)
        if is_trained:
            check_training(network, spec)
    except UserError as error:
        return str(error)
    return None


def check_imports(family: str) -> None:
    """Refuse a family that imports code of the project that its stages do not depend on: after an
    edit there, DVC would restore the old results."""
    tree = ast.parse(Path(family_module(family).__file__).read_bytes())
    for name in sorted(set(_imported_names(tree))):
        try:
            origin = find_spec(name).origin
        except (AttributeError, ImportError, ValueError):  # no module: a class or a function
            continue
        file = Path(origin or "").absolute()
        is_ours = name.startswith("pipeline.") or file.is_relative_to(Path.cwd())
        is_package = file.name == "__init__.py" or "site-packages" in file.parts
        if is_ours and not is_package and not name.startswith(WATCHED):
            raise UserError(
                f"{family_file(family)} imports `{name}`, which DVC does not watch for this "
                f"network: an edit there would train nothing again. Move that code into "
                f"{family_file(family)}."
            )


def _imported_names(tree: ast.Module) -> list[str]:
    """Names that may be modules: of `from a import b`, `a` and `a.b`."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            beside = ["pipeline", "networks"][: 3 - node.level] if node.level else []
            module = ".".join([*beside, *([node.module] if node.module else [])])
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return names


def check_training(network: nn.Module, spec: ModelSpec) -> None:
    """Refuse a network without a gradient for two images."""
    network.train()
    logits = logits_of(network, two_images(spec), spec, "in training")
    try:
        logits.sum().backward()
    except Exception as error:  # code of a user's, which may do anything
        failure = describe_failure(error, spec.family)
        raise UserError(f"network `{spec.network}` has no gradient: {failure}.") from None


def main() -> None:
    argparse.ArgumentParser(
        "python -m pipeline.commands.check_networks", description=__doc__
    ).parse_args()
    if lines := problems():
        raise UserError("\n".join(lines))


if __name__ == "__main__":
    run_command(main)
