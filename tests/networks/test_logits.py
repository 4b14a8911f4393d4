"""A store of another system's logits teaches as the network that computed them."""

import hashlib
import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import foreign
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    PARAMS,
    bytes_of,
    change_params,
    opened,
    prepare,
    run_stage,
    write_params,
)
from logit_tables import VIEWS, import_table, made_up_logits, table, write_npz
from safetensors.numpy import load_file
from stage_process import finish, resumed, start

from pipeline.commands import check
from pipeline.commands.store import verify
from pipeline.data.prepared.dataset import open_dataset
from pipeline.models import checkpoint, evaluation
from pipeline.networks import logits as family
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.outputs import STORE, TEACHER
from pipeline.store.format import schema
from pipeline.store.format.schema import INDEX, SHARD_SAMPLES
from pipeline.store.reading import store as reading
from pipeline.store.writing import imported_logits
from pipeline.store.writing import job as writing_job
from pipeline.views.loader import open_views
from pipeline.views.policy import ViewPolicy

IDENTITY = ("dataset_fingerprint", "policy", "seed", "image_size", "precision", "num_classes")
STUDENT = Path("models/students/small")


def answers_of_the_network() -> dict[str, np.ndarray]:
    """By split, [views, N, C] float32: in the batches of the stage."""
    network, description = checkpoint.load(TEACHER.model, produced_by="-")
    answers = {}
    for name, split in open_dataset().splits.items():
        policy = ViewPolicy("crop_flip" if name == "train" else "none")
        views = open_views(split, policy, 7, torch.device("cpu"))
        order = np.split(np.arange(len(split)), range(13, len(split), 13))
        answers[name] = np.stack(
            [
                np.concatenate(
                    [
                        evaluation.predict(network, description.input, batch.pixels).numpy()
                        for batch in views.batches(view, order)
                    ]
                )
                for view in range(VIEWS if name == "train" else 1)
            ]
        )
    return answers


def write_store(answers: dict[str, np.ndarray], **identity: object) -> str:
    """By the format's page alone."""
    dataset, index = open_dataset(), read_json(STORE / "store.json", produced_by="-")
    said = {key: index[key] for key in IDENTITY} | {
        "teacher_fingerprint": "f" * 64,
        "encoding": "dense",
    }
    splits = {name: (s.images, s.labels, answers[name]) for name, s in dataset.splits.items()}
    shutil.rmtree("mine", ignore_errors=True)
    names = list(dataset.class_names)
    foreign.write(Path("mine"), said | identity, names, splits, len(answers["train"]))
    return "mine"


def teach_with(path: str, **teacher: object) -> None:
    set_teacher(path, **teacher)
    run_stage("teacher")


def set_teacher(path: str, **teacher: object) -> None:
    logits = {"family": "logits", "network": "mine", "weights": "logits", "checkpoint": path}
    change_params("teacher", **logits | teacher)


def rows() -> np.ndarray:
    """All training rows of the store, [views, N, C], every byte of it verified."""
    store = opened()
    return np.stack([store.gather(view, np.arange(36)).logits for view in range(store.num_views)])


WRITERS = {
    "imported table": lambda answers: import_table(write_npz(table(answers))),
    "foreign store": write_store,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_answers_of_a_network_teach_as_the_network_does(project, capsys, kind):
    expected, student = rows(), bytes_of(STUDENT)
    measured = read_json("metrics/teacher.json", produced_by="-")
    teach_with(WRITERS[kind](answers_of_the_network()))
    run_stage("soft_targets")
    assert rows().tobytes() == expected.tobytes()
    assert "108 of them match the teacher's logits" in verify(STORE, 108, seed=0)

    capsys.readouterr()
    shutil.rmtree(STUDENT)
    run_stage("student", "small")
    assert bytes_of(STUDENT) == student
    run_stage("compare")
    head, _, row = capsys.readouterr().out.partition("teacher: ")[2].splitlines()[:3]
    assert head == "test accuracy 100.00%, logits without a network"
    assert row.split()[-4:] == ["-", "3.1", "M", "-"]  # no compression, no fewer MACs

    metrics = read_json("metrics/teacher.json", produced_by="-")
    costs = {"parameters", "macs", "size_bytes"}
    assert metrics.keys() == measured.keys() - costs
    for name in ("validation_accuracy", "test_accuracy", "test_top5_accuracy"):
        assert metrics[name] == measured[name]
    assert load_file(TEACHER.model / checkpoint.WEIGHTS) == {}
    assert TEACHER.history.read_text("utf-8").count("\n") == 1  # it was not trained
    curves = pd.read_csv("reports/training_curves.csv")
    assert set(curves["role"]) == {"distilled", "baseline"}
    assert "The teacher was not trained here" in Path("reports/index.html").read_text("utf-8")


def test_rows_are_encoded_as_this_project_says(project):
    store = write_store(answers_of_the_network())
    change_params("soft_targets", encoding="top_k", k=1)
    run_stage("soft_targets")
    expected = opened().decoded_at(2.0).gather(1, np.arange(36))
    teach_with(store)
    run_stage("soft_targets")
    found = opened().decoded_at(2.0).gather(1, np.arange(36))
    assert np.array_equal(found.kept, expected.kept)
    # The tail's sums are those of numbers in float16.
    np.testing.assert_allclose(found.logits, expected.logits, rtol=2e-3, atol=2e-3)


def test_the_page_shows_the_costs_of_networks_alone(project):
    teach_with(write_store(answers_of_the_network()))
    run_stage("soft_targets")
    run_stage("student", "small")
    for stage in ("export", "robustness"):
        for models in ("--teacher", "small"):
            run_stage(stage, models)
    for stage in ("speed", "compare"):
        run_stage(stage)
    summary = Path("reports/comparison.md").read_text("utf-8")
    (line,) = [line for line in summary.splitlines() if line.startswith("| teacher ")]
    assert line.replace(" ", "").endswith("|-|-|-|")
    assert "The teacher has 100.00%. It agrees" in summary
    page = Path("reports/index.html").read_text("utf-8")
    assert "fewer</small>" not in page
    # No teacher was run for the cache.
    assert "teacher passes" not in summary + page
    assert "cache" not in read_json("metrics/comparison.json", produced_by="-")
    comparison = pd.read_csv("reports/comparison.csv", index_col="model")
    assert np.isnan(comparison.loc["teacher", "parameters"])
    lines = Path("reports/comparison.csv").read_text("utf-8").splitlines()
    assert ",77587," in lines[2]  # a whole number still


def test_without_views_every_view_of_an_image_has_the_same_logits(project, capsys):
    answers = answers_of_the_network()
    teach_with(import_table(write_npz(table(answers, by_view=False))))
    run_stage("soft_targets")
    line = "mine has one row per image, which is used for every view of it"
    assert line in capsys.readouterr().out
    first = answers["train"][0].astype(np.float16)
    assert np.array_equal(rows(), np.stack([first] * VIEWS))
    change_params("views", policy="crop", seed=8, count=2)  # no reason to import again
    run_stage("soft_targets")
    assert np.array_equal(rows(), np.stack([first] * 2))


def test_encoded_and_unlabelled_images_have_logits_by_their_ids_too(project):
    folder = Path("images/unlabeled")
    folder.mkdir()
    shutil.copy("images/train/ant/000.png", folder / "who.png")
    prepare(storage="encoded")
    write_params(Path(), PARAMS)
    dataset, rng = open_dataset(), np.random.default_rng(2)
    answers = {
        name: (4 * np.eye(3)[split.labels] + rng.standard_normal((1, len(split), 3))).astype("f4")
        for name, split in dataset.splits.items()
    }
    teach_with(import_table(write_npz(table(answers, by_view=False))))
    run_stage("soft_targets")
    found = opened().gather(1, np.arange(37)).logits
    assert np.array_equal(found, answers["train"][0].astype(np.float16))


def test_mixed_views_need_the_logits_of_each_view(project):
    answers = answers_of_the_network()
    change_params("views", mix={"method": "mixup"})
    teach_with(import_table(write_npz(table(answers, by_view=False))))
    with pytest.raises(UserError, match="but `views.mix` mixes two images in a view"):
        run_stage("soft_targets")
    teach_with(import_table(write_npz(table(answers))))
    run_stage("soft_targets")
    assert np.array_equal(rows(), answers["train"].astype(np.float16))


def test_finished_shards_are_kept_and_the_output_speaks_of_no_teacher_pass(
    project, monkeypatch, capsys
):
    teach_with(write_store(answers_of_the_network()))
    run_stage("soft_targets")
    before, output = bytes_of(STORE), capsys.readouterr().out
    assert "ahead: 132 rows of `mine`; " in output
    assert "teacher pass" not in output
    asked, original = [], writing_job.shard_logits

    def watched(job, key):
        asked.append((key.split, key.view))
        return original(job, key)

    monkeypatch.setattr(writing_job, "shard_logits", watched)
    shutil.rmtree(STORE)
    (second_view,) = Path(".scratch/soft_targets").glob("*/train_view00001_*.h5")
    second_view.unlink()
    run_stage("soft_targets")
    assert asked == [("train", 1)]
    assert resumed(capsys.readouterr().out) == 4
    assert bytes_of(STORE) == before


@pytest.mark.slow
def test_of_several_processes_one_reads_the_logits(project):
    teach_with(write_store(answers_of_the_network()))
    teacher = bytes_of(TEACHER.model)
    shutil.rmtree(TEACHER.model)
    finish(start(2, stage="teacher"))
    assert bytes_of(TEACHER.model) == teacher


def test_other_logits_than_the_teachers_are_refused_until_it_is_made_again(project):
    answers = answers_of_the_network()
    path = write_store(answers)
    teach_with(path)
    fingerprint = checkpoint.fingerprint(TEACHER.model, produced_by="-")
    answers["train"][2, 35, 1] += 1
    write_store(answers)
    with pytest.raises(UserError) as refusal:
        run_stage("soft_targets")
    assert str(refusal.value) == (
        f"`{path}` holds other logits than those that `models/teacher` was made from. Run "
        "`dvc repro teacher`."
    )
    run_stage("teacher")
    assert checkpoint.fingerprint(TEACHER.model, produced_by="-") != fingerprint
    run_stage("soft_targets")
    assert np.array_equal(rows(), answers["train"].astype(np.float16))


def test_recompute_catches_a_row_that_is_not_that_of_the_imported_store(project):
    teach_with(write_store(answers_of_the_network()))
    run_stage("soft_targets")
    with h5py.File(STORE / "train_view00001_sample000000000.h5", "r+") as file:
        file["logits"][17, 0] += 0.1
        digest = hashlib.sha256(file["logits"][()].tobytes()).hexdigest()
        file.attrs["logits_sha256"] = np.bytes_(digest)
    with pytest.raises(UserError, match="train view 1 sample 17: the logit of ant is"):
        verify(STORE, 108, seed=0)


def test_the_gate_names_the_classes_of_swapped_columns(project):
    arrays = table(answers_of_the_network())
    swapped = np.array(["ant", "cat", "bee"])  # the first two columns change their names
    store = import_table(write_npz(arrays | {"class_names": swapped}))
    before = bytes_of(TEACHER.model)
    with pytest.raises(UserError) as refusal:
        teach_with(store)
    assert bytes_of(TEACHER.model) == before
    message = str(refusal.value)
    assert (
        "classes in the best other order: 100.00%; images of `ant` are predicted as `cat`, images "
        "of `cat` are predicted as `ant`\n" in message
    )
    assert "The likeliest cause is the names of the classes" in message
    assert "Name each column of logits after its class." in message


def test_logits_of_chance_are_refused_with_a_hint(project):
    answers = answers_of_the_network()
    rng = np.random.default_rng(1)
    chance = {name: rng.standard_normal(rows.shape, np.float32) for name, rows in answers.items()}
    with pytest.raises(UserError, match="Check that each row has the id of its own image"):
        teach_with(write_store(chance), minimum_accuracy=0.9)


def test_more_views_than_the_store_has_are_refused(project):
    teach_with(write_store(answers_of_the_network()))
    change_params("views", count=4)
    with pytest.raises(UserError, match="has 3 views of the training images, but `views.count`"):
        run_stage("soft_targets")
    change_params("views", count=2)
    run_stage("soft_targets")
    assert opened().num_views == 2


def change_index(**values: object) -> None:
    path = Path("mine/store.json")
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def change_shard(split: str, change: Callable[[h5py.File], None], *, checksums: bool) -> None:
    """Change a shard, with or without the checksums of its arrays."""
    view = 1 if split == "train" else 0
    with h5py.File(f"mine/{split}_view{view:05d}_sample000000000.h5", "r+") as file:
        change(file)
        for name in ("logits", "canaries") if checksums else ():
            digest = hashlib.sha256(file[name][()].tobytes()).hexdigest()
            file.attrs[f"{name}_sha256"] = np.bytes_(digest)


def set_nan(file: h5py.File) -> None:
    file["logits"][7, 1] = np.nan


def set_canary(file: h5py.File) -> None:
    file["canaries"][0, 0] += 1


def reverse(file: h5py.File) -> None:
    file["logits"][...] = file["logits"][()][::-1]


def to_probabilities(file: h5py.File) -> None:
    file["logits"][...] = torch.from_numpy(file["logits"][()]).float().softmax(1).half().numpy()


def compress(file: h5py.File) -> None:
    logits = file["logits"][()]
    del file["logits"]
    file.create_dataset("logits", data=logits, compression="gzip")


def link_elsewhere(file: h5py.File) -> None:
    with h5py.File("mine/elsewhere.h5", "w") as other:
        file.copy("logits", other)
    del file["logits"]
    file["logits"] = h5py.ExternalLink("elsewhere.h5", "/logits")


TEST, VALIDATION = (
    f"mine/{split}_view00000_sample000000000.h5" for split in ("test", "validation")
)
BY_TEACHER = [
    (
        lambda: Path("mine/store.json").unlink(),
        r"`mine` is no store of logits: it has no `store.json`. .*import_logits TABLE mine",
    ),
    (
        lambda: change_index(format_version=1, num_views=0),
        r"`mine/store.json: format_version` is 1; expected 2.\n.*num_views` is 0; expected greater",
    ),
    (
        lambda: change_index(encoding="top_k", k=1),
        "has encoding top_k; expected dense, because validation and test need every logit",
    ),
    (
        lambda: change_index(dataset_fingerprint="e" * 64),
        r"has dataset_fingerprint eeeeeeeeeeee…, but data/prepared \w{12}…\.",
    ),
    (
        lambda: change_index(class_names=["bee", "ant", "cat"]),
        r"has class_names \['bee', 'ant', 'cat'\], but data/prepared \['ant', 'bee', 'cat'\]",
    ),
    (
        lambda: Path("mine/train_view00002_sample000000000.h5").unlink(),
        r"`mine/train_view00002_sample000000000.h5` is absent \(.*Write it again",
    ),
    (lambda: Path(TEST).write_bytes(b"no HDF5"), rf"`{TEST}` is damaged \("),
    (
        lambda: change_shard("test", compress, checksums=False),
        rf"`{TEST}` is damaged \(its logits are a link, in another file, chunked or compressed",
    ),
    (
        lambda: change_shard("test", link_elsewhere, checksums=False),
        rf"`{TEST}` is damaged \(its logits are a link, in another file, chunked or compressed",
    ),
    (
        lambda: change_shard("validation", reverse, checksums=False),
        rf"`{VALIDATION}` is damaged: its logits do not match",
    ),
    (
        lambda: change_shard("test", set_nan, checksums=True),
        "the first is sample 7 of test: nan for `bee`",
    ),
    (lambda: change_shard("test", to_probabilities, checksums=True), "holds probabilities"),
]
BY_SOFT_TARGETS = [
    (lambda: shutil.copy(TEST, VALIDATION), "says split test; expected validation"),
    (
        lambda: change_shard("train", reverse, checksums=False),
        "`mine/train_view00001_sample000000000.h5` is damaged: its logits do not match",
    ),
    (
        lambda: change_shard("train", set_nan, checksums=True),
        "first is sample 7: nan for `bee`",
    ),
    (
        lambda: change_shard("train", set_canary, checksums=True),
        "has canaries that differ: the images or the augmentation have changed",
    ),
    (
        lambda: change_params("views", seed=8, policy="crop"),
        r"`mine` was written for view policy crop_flip, but params.yaml says crop.\n"
        r"`mine` was written for views.seed 7, but params.yaml says 8.\nSet params.yaml to",
    ),
    (
        lambda: change_params("soft_targets", precision="bfloat16"),
        "`mine` was written for soft_targets.precision float32, but params.yaml says bfloat16",
    ),
]


@pytest.mark.parametrize(("change", "message"), BY_TEACHER)
def test_the_teacher_refuses_a_store_that_is_damaged_or_of_another_dataset(
    project, change, message
):
    set_teacher(write_store(made_up_logits()))
    change()
    with pytest.raises(UserError, match=message):
        run_stage("teacher")


@pytest.mark.parametrize(("change", "message"), BY_SOFT_TARGETS)
def test_soft_targets_refuses_a_store_that_is_damaged_or_of_other_views(project, change, message):
    set_teacher(write_store(made_up_logits()))
    change()
    run_stage("teacher")
    before = bytes_of(STORE)
    with pytest.raises(UserError, match=message):
        run_stage("soft_targets")
    assert bytes_of(STORE) == before


def test_a_store_of_several_shards_is_read_at_any_samples(project, monkeypatch):
    for module, name in ((family, "_SHARD_SAMPLES"), (foreign, "SHARD"), (schema, "SHARD_SAMPLES")):
        monkeypatch.setattr(module, name, 16)
    for reader in (imported_logits, reading):
        monkeypatch.setattr(reader, "SHARD_SAMPLES", 16)
    answers = answers_of_the_network()
    teach_with(write_store(answers))
    run_stage("soft_targets")
    assert np.array_equal(rows(), answers["train"].astype(np.float16))


def test_the_stages_agree_on_the_format():
    assert (family._SHARD_SAMPLES, family.INDEX) == (SHARD_SAMPLES, INDEX)


def test_what_params_yaml_says_of_logits_is_checked_before_anything_runs(project):
    set_teacher("mine.npz")
    Path("mine.npz").touch()
    (problem,) = check.problems()
    assert problem == (
        "`params.yaml: teacher.checkpoint` is `mine.npz`, which is no folder of a store; `weights: "
        "logits` needs one. Make it of a table: `python -m pipeline.commands.import_logits TABLE`."
    )
    path = write_store(answers_of_the_network())
    set_teacher(path)
    assert check.problems() == []
    set_teacher(path, family="cifar_resnet")
    assert any("set both, or neither" in problem for problem in check.problems())
    set_teacher(path, weights="checkpoint")
    assert any("family is `logits` and weights is `checkpoint`" in p for p in check.problems())
    set_teacher(path, network={"name": "mine", "input_size": 32})
    assert any("network has more than a name" in problem for problem in check.problems())


def test_logits_are_no_students_network_and_no_network_to_load(project):
    params = deepcopy(PARAMS)
    params["students"]["small"] |= {"family": "logits", "network": "mine"}
    write_params(Path(), params)
    with pytest.raises(UserError, match="`mine` of family `logits` is no network"):
        run_stage("student", "small")
    teach_with(write_store(answers_of_the_network()))
    with pytest.raises(UserError, match="`models/teacher` holds no network, but the logits"):
        checkpoint.load(TEACHER.model, produced_by="-")
