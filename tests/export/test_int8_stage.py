"""The stage writes int8 files that prove themselves, and says why others have none."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from conftest import change_params, run_stage

from pipeline.comparison.results import read_refused
from pipeline.data.prepared.dataset import open_dataset
from pipeline.data.sources.params import DatasetParams
from pipeline.export.model_card import ModelCard, NoFile, read_card
from pipeline.export.params import ExportParams
from pipeline.runtime.files import read_json, sha256_of_file, write_json
from pipeline.runtime.outputs import NOT_ASKED, ExportedFile, ModelOutputs
from pipeline.runtime.params import load_section
from pipeline.stages.export import WrittenFile, export_network, quantised
from pipeline.views.params import ViewsParams

INT8 = [ExportedFile(role, "small", "int8") for role in ("distilled", "baseline")]


def card_of(file: ExportedFile) -> ModelCard | NoFile:
    return read_card(file.card, produced_by="-")


def test_both_trainings_are_compared_as_int8_and_the_distilled_one_was_trained_for_it(project):
    assert [card_of(file).no_file for file in INT8] == [NOT_ASKED] * 2
    change_params(
        "export", precision="int8", largest_loss=100.0, licence="MIT", int8_training={"epochs": 1}
    )
    for stage, *arguments in (
        ("int8_training", "small"),
        ("export", "small"),
        ("robustness", "small"),
        ("compare",),
    ):
        run_stage(stage, *arguments)
    figures = read_json("metrics/export/students/small.json", produced_by="-")
    for file in INT8:
        card = card_of(file)
        assert card.file.sha256 == sha256_of_file(file.path)
        assert (card.precision, card.licence) == ("int8", "MIT")
        assert card.int8.gain == figures[file.key]["gain"]
        assert card.int8.trained == (file.role == "distilled")
    report = Path("reports/index.html").read_text("utf-8")
    assert "int8 files beside their float32 files" in report
    rows = Path("reports/comparison.csv").read_text("utf-8")
    assert rows.count("int8") >= 2


def test_a_file_that_loses_too_much_is_not_written_and_its_card_has_the_numbers(project):
    dataset = open_dataset()
    labels = np.asarray(dataset.splits["test"].labels)
    params, views = load_section(DatasetParams, "dataset"), load_section(ViewsParams, "views")
    float32 = export_network(ModelOutputs("baseline", "small"), dataset, params, None, graphs={})
    assert (float32.logits["test"].argmax(1) != labels).any()
    perfect = {**float32.logits, "test": np.eye(3, dtype=np.float32)[labels]}
    options = ExportParams(precision="int8", largest_loss=0.5, int8_training="none")
    refused = quantised(replace(float32, logits=perfect), dataset, views, options, graphs={})
    assert not isinstance(refused, WrittenFile)
    assert "points of accuracy against the float32 file (100.00% to" in refused.card.no_file
    write_json(refused.file.card, refused.card.model_dump(exclude_none=True))
    assert read_refused(["small"]) == {("small", "baseline"): refused.card.no_file}
    run_stage("compare")
    assert "not written: int8 loses" in Path("reports/index.html").read_text("utf-8")
