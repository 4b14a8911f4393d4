"""Read the files of weights and logits that params.yaml names, as the stages will.

`check_networks` calls this, after it has built the networks. Of weights and ONNX files all is read;
of a store of logits its index and the headers of its shards.
"""

import io
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

from pipeline.data.prepared.dataset import Dataset
from pipeline.data.sources.archives import is_zip
from pipeline.data.sources.image_folder import image_folder
from pipeline.data.sources.params import DatasetParams
from pipeline.initial_weights.foreign_checkpoint import find_foreign_weights
from pipeline.initial_weights.state_dict import Key
from pipeline.models.family import family_module
from pipeline.models.params import WeightsFile
from pipeline.models.spec import ModelSpec, build, model_spec
from pipeline.runtime.errors import UserError
from pipeline.runtime.params import load_section
from pipeline.runtime.validation import read_model
from pipeline.store.format.schema import INDEX, StoreIndex, shard_attributes
from pipeline.store.format.shards import (
    ShardError,
    check_attributes,
    check_shapes,
    read_header,
    row_shapes,
)
from pipeline.students.initial_network import build_initial_network
from pipeline.students.params import load_student, load_training
from pipeline.teacher import foreign_teacher
from pipeline.teacher.params import TeacherParams
from pipeline.views.params import ViewsParams


def check_file(key: str, dataset: Dataset) -> None:
    """Read what the teacher, or a student, is or starts from.

    Args:
        key: `teacher` or `students.NAME`; its network has been built, if it has one.
        dataset: of params.yaml; its classes may be others.

    Raises:
        UserError: a file is of another kind, damaged, or does not fit the network or the dataset.
    """
    teacher = load_section(TeacherParams, "teacher")
    with redirect_stdout(io.StringIO()):  # the stages print what was taken
        if key != "teacher":
            _check_start(key.removeprefix("students."), dataset)
        elif teacher.weights == "logits":
            check_store(Path(teacher.checkpoint))
        elif teacher.weights == "checkpoint":
            _check_checkpoint(teacher, dataset)


def _check_start(name: str, dataset: Dataset) -> None:
    student = load_student(name)
    if isinstance(student.network.weights, WeightsFile):
        dataset = dataset.resized(load_section(ViewsParams, "views").image_size)
        dataset = replace(dataset, class_names=class_names() or dataset.class_names)
        training = load_training(name, student).trainings[0]
        build_initial_network(name, student, training, dataset)


def _check_checkpoint(teacher: TeacherParams, dataset: Dataset) -> None:
    path, names = Path(teacher.checkpoint), class_names()
    dataset = replace(dataset, class_names=names or dataset.class_names)
    spec = model_spec(teacher.family, teacher.network, dataset)
    spec = foreign_teacher.input_of_file(spec, teacher.network, path)
    if names:
        classes = teacher.checkpoint_classes
        foreign_teacher.load_foreign(spec, path, teacher.checkpoint_key, classes)
    else:
        _check_without_classes(spec, path, teacher.checkpoint_key)


def class_names() -> list[str] | None:
    """The classes that `prepare` will find; None if it takes more than names to know them."""
    dataset = load_section(DatasetParams, "dataset")
    if dataset.source == "mnist_5k":
        return [str(digit) for digit in range(10)]
    root = Path(dataset.root)
    if dataset.source == "image_folder" and (root.is_dir() or is_zip(root)):
        return image_folder(dataset).class_names
    return None


def _check_without_classes(spec: ModelSpec, path: Path, key: str | None) -> None:
    family = family_module(spec.family)
    if not hasattr(family, "build_from_file"):
        find_foreign_weights(build(spec), spec, path, Key(key, "teacher.checkpoint_key"))
        return
    try:
        family.read_file(path)
    except UserError as error:
        raise UserError(f"`{path}`: {error}") from None


def check_store(path: Path) -> None:
    """Read the index of a store, and the header of each shard that it names."""
    index = read_model(path / INDEX, StoreIndex, produced_by="dvc pull")
    for key in index.shards():
        shard = path / key.file_name
        try:
            header = read_header(shard)
            check_attributes(header, shard_attributes(index, key))
            check_shapes(header, row_shapes(index, key))
        except ShardError as error:
            raise UserError(
                f"`{shard}` {error}. Copy the store again, or write it again, as "
                "docs/soft_targets_format.md says."
            ) from None
