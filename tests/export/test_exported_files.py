"""Beside each exported file stands a model card that describes it."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import PARAMS, change_params, run_stage
from import_closure import ROOT
from safetensors.numpy import load_file

from pipeline.data.prepared.dataset import open_dataset
from pipeline.export.model_card import NoFile, read_card
from pipeline.models import checkpoint
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, write_json
from pipeline.runtime.outputs import TEACHER, ExportedFile, ExportOutputs, ModelOutputs

FILES = [ExportedFile("teacher"), *(ExportedFile(r, "small") for r in ("distilled", "baseline"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.role)
def test_a_card_describes_the_file_beside_it_as_the_comparison_does(exported, file):
    card = read_card(file.card, produced_by="-")
    content, model = file.path.read_bytes(), ModelOutputs(file.role, file.name)
    assert (card.name, card.role, card.precision) == (file.name or "teacher", file.role, "float32")
    assert (card.file.name, card.file.bytes) == (file.path.name, len(content))
    assert card.file.sha256 == hashlib.sha256(content).hexdigest()
    assert card.network.fingerprint == checkpoint.fingerprint(model.model, produced_by="-")
    assert (card.network.family, card.network.name) == ("cifar_resnet", "resnet8")
    assert card.classes == ["ant", "bee", "cat"]
    dataset = open_dataset()
    assert (card.dataset_fingerprint, card.test.images) == (dataset.fingerprint, 12)
    table = pd.read_csv("reports/comparison.csv").set_index("role").loc[file.role]
    measured = (card.test.low, card.test.accuracy, card.test.high)
    assert measured == pytest.approx(tuple(table[["low", "accuracy", "high"]]), abs=1e-6)
    assert card.test.low < card.test.high
    of_distilled = {"family": "cifar_resnet", "network": "resnet8", "options": {}}
    assert card.teacher == (of_distilled if file.role == "distilled" else None)


def test_a_card_of_an_int8_file_that_was_not_asked_for_says_so(exported):
    card = read_card(ExportedFile("distilled", "small", "int8").card, produced_by="-")
    assert isinstance(card, NoFile)
    assert card.no_file == "`export.precision` is float32"


def test_the_cards_of_a_student_and_its_baseline_have_the_start_that_their_stages_wrote(exported):
    starts = []
    for file in [*FILES[1:], *(replace(file, precision="int8") for file in FILES[1:])]:
        description = ModelOutputs(file.role, file.name).model / checkpoint.DESCRIPTION
        starts.append(read_card(file.card, produced_by="-").start)
        assert starts[-1].model_dump() == read_json(description, produced_by="-")["start"]
    assert starts == [starts[0]] * 4
    assert starts[0].text == "from scratch"
    assert "start" not in read_json(FILES[0].card, produced_by="-")  # the teacher's


def test_a_card_has_the_parameters_of_the_training_and_no_comparison_is_made_of_others(project):
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    student = PARAMS["students"]["small"] | {"export": {"licence": "CC BY 4.0"}}
    change_params("students", small=student)
    for stage in ("export", "robustness"):
        run_stage(stage, "small")
    card = read_card(ExportedFile("baseline", "small").card, produced_by="-")
    keys = yaml.safe_load(Path("dvc.yaml").read_text("utf-8"))["stages"]["baseline"]["do"]["params"]
    assert sorted(card.training) == sorted(key.replace("${key}", "small") for key in keys)
    assert card.training["training"] == PARAMS["training"]
    assert card.licence == "CC BY 4.0"
    run_stage("compare")
    change_params("training", epochs=3)
    message = r"`models/exported/small.json` was made when `params.yaml: training` was "
    with pytest.raises(UserError, match=message + ".*--single-item student@small"):
        run_stage("compare")


def test_a_teacher_of_imported_logits_has_a_card_with_the_reason_and_its_own_logits(project):
    source = checkpoint.LogitSource(
        family="logits",
        network="mine",
        class_names=open_dataset().class_names,
        path="mine.npz",
        contents_sha256=64 * "0",
    )
    checkpoint.save_source(TEACHER.model, source)
    run_stage("export", "--teacher")
    (file,) = ExportOutputs().files
    card = read_card(file.card, produced_by="-")
    assert isinstance(card, NoFile)
    assert card.no_file == "it is imported logits, which have no network"
    assert not file.path.exists()
    own, of_file = load_file(TEACHER.predictions), load_file(ExportOutputs().predictions)
    assert {f"teacher.float32.{k}": v.tolist() for k, v in own.items()} == {
        key: values.tolist() for key, values in of_file.items()
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"format_version": 9}, "format_version` is 9; expected 1"),
        ({"file": {}}, "file.name` is missing"),
        ({"classes": "ant"}, "classes` is 'ant'; expected "),
    ],
)
def test_a_damaged_card_is_refused_with_the_stage_that_writes_it(
    exported, tmp_path, change, problem
):
    path = tmp_path / "small.json"
    write_json(path, read_json(FILES[1].card, produced_by="-") | change)
    with pytest.raises(
        UserError, match=f"small.json: {problem}(.|\n)*run `dvc repro export@small`"
    ):
        read_card(path, produced_by="dvc repro export@small")
