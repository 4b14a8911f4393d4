"""A table or a store of logits teaches as the network that computed them."""

import hashlib
import json
import pickle
import shutil
from copy import deepcopy
from pathlib import Path
from textwrap import dedent

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
    take_as_prepared,
    write_params,
)
from import_closure import ROOT
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
from pipeline.store.format.schema import SHARD_SAMPLES
from pipeline.store.writing import job as writing_job
from pipeline.views.loader import open_views
from pipeline.views.policy import ViewPolicy

VIEWS, SPLITS = 3, ("train", "validation", "test")
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


def table(answers: dict[str, np.ndarray], *, by_view: bool = True) -> dict[str, np.ndarray]:
    """The arrays of an .npz, rows and classes in another order."""
    dataset = open_dataset()
    parts = [
        (sample_id, name, view, row)
        for name, split in dataset.splits.items()
        for view in range(len(answers[name]) if by_view else 1)
        for sample_id, row in zip(split.sample_ids, answers[name][view], strict=True)
    ]
    order = np.random.default_rng(0).permutation(len(parts))
    ids, splits, views, rows = zip(*(parts[n] for n in order), strict=True)
    classes = [2, 0, 1]
    arrays = {
        "ids": np.array(ids),
        "logits": np.stack(rows)[:, classes],
        "class_names": np.array(dataset.class_names)[classes],
    }
    return arrays | ({"splits": np.array(splits), "views": np.array(views)} if by_view else {})


def write_npz(arrays: dict[str, np.ndarray]) -> str:
    np.savez("mine.npz", **arrays)
    return "mine.npz"


def write_csv(arrays: dict[str, np.ndarray]) -> str:
    frame = pd.DataFrame(arrays["logits"], columns=arrays["class_names"])
    for column, name in (("id", "ids"), ("split", "splits"), ("view", "views")):
        if name in arrays:
            frame.insert(0, column, arrays[name])
    frame.to_csv("mine.csv", index=False)
    return "mine.csv"


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
    "csv": lambda answers: write_csv(table(answers)),
    "npz": lambda answers: write_npz(table(answers)),
    "store": write_store,
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


@pytest.mark.parametrize("kind", WRITERS)
def test_rows_are_encoded_as_this_project_says(project, kind):
    write = WRITERS[kind](answers_of_the_network())
    change_params("soft_targets", encoding="top_k", k=1)
    run_stage("soft_targets")
    expected = opened().decoded_at(2.0).gather(1, np.arange(36))
    teach_with(write)
    run_stage("soft_targets")
    found = opened().decoded_at(2.0).gather(1, np.arange(36))
    assert np.array_equal(found.kept, expected.kept)
    # The tail's sums of a store's rows are those of numbers in float16.
    tolerance = 2e-3 if kind == "store" else 0
    np.testing.assert_allclose(found.logits, expected.logits, rtol=tolerance, atol=tolerance)


def test_the_page_shows_the_costs_of_networks_alone(project):
    teach_with(write_npz(table(answers_of_the_network())))
    run_stage("soft_targets")
    run_stage("student", "small")
    for arguments in (["robustness", "--teacher"], ["robustness", "small"], ["speed"], ["compare"]):
        run_stage(*arguments)
    summary = Path("reports/comparison.md").read_text("utf-8")
    (line,) = [line for line in summary.splitlines() if line.startswith("| teacher |")]
    assert line.endswith("| - | - | - |")
    assert "The teacher has 100.00%. It agrees" in summary
    page = Path("reports/index.html").read_text("utf-8")
    assert "fewer</small>" not in page
    # No teacher was run for the cache.
    assert "teacher passes" not in summary + page
    assert "cache" not in read_json("metrics/comparison.json", produced_by="-")
    comparison = pd.read_csv("metrics/comparison.csv", index_col="model")
    assert np.isnan(comparison.loc["teacher", "parameters"])
    lines = Path("metrics/comparison.csv").read_text("utf-8").splitlines()
    assert ",77587," in lines[2]  # a whole number still


def test_damaged_images_are_no_teachers_measure(project):
    path = write_npz(table(answers_of_the_network()))
    labels = Path("data/prepared/validation_labels.npy")
    np.save(labels, np.roll(np.load(labels), 1))
    with pytest.raises(UserError, match="`data/prepared` is damaged"):
        teach_with(path)


def test_rows_may_come_in_any_order_and_beside_those_of_other_images(project, capsys):
    arrays = table(answers_of_the_network())
    teach_with(write_npz(arrays))
    before = bytes_of(TEACHER.model)
    order = np.argsort(arrays["ids"], kind="stable")
    more = {
        name: array if name == "class_names" else array[order] for name, array in arrays.items()
    }
    for name, extra in (("ids", "strange.png"), ("splits", "train"), ("views", 9)):
        more[name] = np.append(more[name], extra)
    more["logits"] = np.concatenate([more["logits"], [[np.nan] * 3]])
    capsys.readouterr()
    teach_with(write_npz(more))
    assert bytes_of(TEACHER.model) == before
    told = "mine.npz: 1 rows are of no image of data/prepared: `strange.png`"
    assert told in capsys.readouterr().out


def test_without_views_every_view_of_an_image_has_the_same_logits(project, capsys):
    answers = answers_of_the_network()
    teach_with(write_csv(table(answers, by_view=False)))
    run_stage("soft_targets")
    line = "mine.csv has one row per image, which is used for every view of it"
    assert capsys.readouterr().out.count(line) == 2
    first = answers["train"][0].astype(np.float16)
    assert np.array_equal(rows(), np.stack([first] * VIEWS))


def test_encoded_and_unlabelled_images_are_answered_by_their_ids_too(project):
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
    arrays = table(answers, by_view=False)
    teach_with(write_npz(arrays))
    run_stage("soft_targets")
    found = opened().gather(1, np.arange(37)).logits
    assert np.array_equal(found, answers["train"][0].astype(np.float16))
    unlabelled = np.flatnonzero(arrays["ids"] == "unlabeled/who.png")
    write_npz(without(rows=unlabelled)(arrays))
    with pytest.raises(UserError, match="1 rows are missing of train, 37 images: `unlabeled/who"):
        run_stage("teacher")


def test_mixed_views_need_the_answers_to_each_view(project):
    answers = answers_of_the_network()
    change_params("views", mix={"method": "mixup"})
    teach_with(write_npz(table(answers, by_view=False)))
    with pytest.raises(UserError, match="but `views.mix` mixes two images in a view"):
        run_stage("soft_targets")
    teach_with(write_npz(table(answers)))
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


def test_two_processes_write_what_one_writes(project):
    teach_with(write_npz(table(answers_of_the_network())))
    run_stage("soft_targets")
    teacher, store = bytes_of(TEACHER.model), bytes_of(STORE)
    shutil.rmtree(TEACHER.model)
    shutil.rmtree(".scratch")
    finish(start(2, stage="teacher"))
    assert bytes_of(TEACHER.model) == teacher
    assert "ahead: 132 rows of `mine.npz`" in finish(start(2))
    assert bytes_of(STORE) == store


@pytest.mark.parametrize("kind", WRITERS)
def test_other_logits_than_the_teachers_are_refused_until_it_is_made_again(project, kind):
    answers = answers_of_the_network()
    path = WRITERS[kind](answers)
    teach_with(path)
    fingerprint = checkpoint.fingerprint(TEACHER.model, produced_by="-")
    answers["train"][2, 35, 1] += 1
    WRITERS[kind](answers)
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


def test_recompute_catches_a_row_that_is_not_the_sources(project):
    teach_with(write_npz(table(answers_of_the_network())))
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
    write_npz(arrays | {"class_names": swapped})
    before = bytes_of(TEACHER.model)
    with pytest.raises(UserError) as refusal:
        teach_with("mine.npz")
    assert bytes_of(TEACHER.model) == before
    message = str(refusal.value)
    assert (
        "images of `ant` are predicted as `cat`, images of `cat` are predicted as `ant` 100.00%"
        in message
    )
    assert "The likeliest cause is the names of the classes" in message
    assert "Name each column of logits after its class." in message
    assert "normalisation" not in message
    assert "input sizes" not in message


def test_if_no_order_explains_it_the_gate_gives_a_hint(project):
    arrays = table(answers_of_the_network())
    chance = np.random.default_rng(1).standard_normal(arrays["logits"].shape)
    with pytest.raises(UserError, match="No other order explains it. Check that each row has"):
        teach_with(write_npz(arrays | {"logits": chance}), minimum_accuracy=0.9)


def without(**names: slice | list[int]):
    """A change that removes rows."""

    def change(arrays):
        taken = names["rows"]
        return {k: v if k == "class_names" else np.delete(v, taken, 0) for k, v in arrays.items()}

    return change


def repeat_first(arrays):
    first = {name: array[:1] for name, array in arrays.items() if name != "class_names"}
    return arrays | {name: np.concatenate([arrays[name], row]) for name, row in first.items()}


def with_number(number: float):
    def change(arrays):
        logits = arrays["logits"].astype(np.float64)
        logits[np.flatnonzero(arrays["views"] == 2)[:5], 1] = number  # of `ant`
        return arrays | {"logits": logits}

    return change


def as_probabilities(arrays):
    return arrays | {"logits": torch.from_numpy(arrays["logits"]).softmax(1).numpy()}


def views_moved(arrays):
    return arrays | {"views": np.where(arrays["views"] == 1, 5, arrays["views"])}


def views_of_test(arrays):
    return arrays | {"views": np.where(arrays["splits"] == "test", 2, arrays["views"])}


def view_lost(arrays):
    """One image's, the first of the prepared ones."""
    first = arrays["ids"] == open_dataset().splits["train"].sample_ids[0]
    return without(rows=np.flatnonzero(first & (arrays["views"] == 1)))(arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: without(rows=np.flatnonzero(a["splits"] == "test"))(a),
            r"has not one row for every image:\n  12 rows are missing of test, 12 images: "
            r"`train/ant/\d+.png`, `train/ant/\d+.png`, `train/ant/\d+.png` and 9 more\n"
            r"The ids are those of data/prepared/train_ids.json",
        ),
        (
            view_lost,
            r"1 rows are missing of train, 36 images in 3 views: `train/ant/\d+.png in view 1`\n",
        ),
        (
            lambda a: a | {"ids": np.char.replace(a["ids"], "train/", "")},
            r"36 rows are missing of train, .*\n.*\n.*\n  132 rows are of no image of "
            r"data/prepared: `\w+/\d+.png`, ",
        ),
        (repeat_first, r"  1 rows of \w+ are there twice: `train/\w+/\d+.png`\n"),
        (
            lambda a: a | {"class_names": np.array(["cat", "ant", "Bee"])},
            r"has logits for 3 classes: 1 of the 3 class folders are not among them \(`bee`; did "
            r"you mean `Bee`\?\), 1 are no class folder \(`Bee`\). Expected each class folder's",
        ),
        (
            lambda a: a | {"class_names": a["class_names"][:2], "logits": a["logits"][:, :2]},
            r"has logits for 2 classes: 1 of the 3 class folders are not among them \(`bee`\), 0 ",
        ),
        (
            lambda a: (
                a
                | {
                    "class_names": np.append(a["class_names"], "ant"),
                    "logits": a["logits"][:, [0, 1, 2, 2]],
                }
            ),
            r"has logits for 4 classes: .* Expected each class folder's name once.",
        ),
        (
            with_number(np.nan),
            r"5 rows have numbers that are not finite, or beyond float16's ±65504: "
            r"`train/\w+/\d+.png: nan for ant`, .* and 2 more. Expected finite logits.",
        ),
        (with_number(np.inf), "inf for ant"),
        (with_number(1e38), r"1e\+38 for ant"),
        (with_number(1e300), "inf for ant"),
        (with_number(-65520.0), "-65520 for ant"),
        (
            as_probabilities,
            "holds probabilities, which are not negative and add up to 1; expected logits. "
            "Save the input of the softmax, or",
        ),
        (views_moved, "has the views `0`, `2`, `5` of train; expected 0, 1 and so on, none left"),
        (views_of_test, "12 rows of validation and test have a view; expected none, or 0: `train/"),
        (
            lambda a: a | {"views": np.where(a["views"] == 2, -1, a["views"])},
            "36 rows of train have no view; expected numbers from 0: `train/",
        ),
        (
            lambda a: a | {"splits": np.char.replace(a["splits"], "validation", "val")},
            "has the split `val`; expected `train`, `validation`, `test`.",
        ),
        (without(rows=slice(None)), r"has no rows; expected one for each of the 60 images."),
        (
            lambda a: {"label" if k == "class_names" else k: v for k, v in a.items()},
            "has the arrays `ids`, `logits`, `label` and 2 more; expected `ids`, `logits` and",
        ),
        (
            lambda a: a | {"ids": a["ids"][1:]},
            r"has logits float32 \[132, 3\]; expected ids \[rows\] of text, logits",
        ),
        (
            lambda a: a | {"logits": a["logits"].astype(str)},
            r"has logits <U\d+ \[132, 3\]; expected",
        ),
        (
            lambda a: a | {"logits": a["logits"][:, :2]},
            "has 2 columns of logits, but 3 class_names; expected one for each",
        ),
        (
            lambda a: a | {"ids": a["ids"].astype(object)},
            "holds pickled objects, which could run code, and was not loaded. Save names and ids",
        ),
    ],
)
def test_a_table_that_is_not_for_this_dataset_is_refused(project, change, message):
    write_npz(change(table(answers_of_the_network())))
    before = bytes_of(TEACHER.model)
    with pytest.raises(UserError, match=message) as refusal:
        teach_with("mine.npz")
    assert str(refusal.value).startswith("`mine.npz`")
    assert bytes_of(TEACHER.model) == before


def edited(change):
    """The text of a table without views, changed."""

    def write():
        path = Path(write_csv(table(answers_of_the_network(), by_view=False)))
        path.write_text(change(path.read_text("utf-8")), "utf-8")

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (edited(lambda t: ""), "has the columns ; expected each once: `id`, one for each class"),
        (
            edited(lambda t: t.splitlines()[0] + "\n"),
            "has no rows; expected one for each of the 60",
        ),
        (edited(lambda t: t.replace("id,", "name,", 1)), "has the columns `name`, `cat`, `ant`"),
        (edited(lambda t: t.replace("cat", "ant", 1)), "has the columns `id`, `ant`, `ant` and 1"),
        (edited(lambda t: t.replace("\ntrain", "\n0,train", 1)), "cannot be read as a table"),
        (
            edited(lambda t: t.replace("\n", ",1\n").replace(",1", "", 1)),
            "more fields than its fir",
        ),
        (edited(lambda t: t.replace(".png,", ".png,x", 1)), "could not convert string to float"),
        (edited(lambda t: t.rpartition(",")[0] + ",\n"), "1 rows have numbers .* nan for bee`"),
        (edited(lambda t: t.rpartition(",")[0] + "\n"), "1 rows have numbers .* nan for bee`"),
        (
            lambda: Path("mine.csv").write_bytes(b"\xff\xfe\x00id"),
            r"cannot be read as a table \('utf-8' codec can't decode .*Expected UTF-8 text",
        ),
    ],
)
def test_a_text_that_is_no_table_is_refused(project, write, message):
    write()
    with pytest.raises(UserError, match=message) as refusal:
        teach_with("mine.csv")
    assert str(refusal.value).startswith("`mine.csv`")


def test_views_of_a_text_are_numbers_or_for_validation_and_test_nothing(project):
    arrays = table(answers_of_the_network())
    write_csv(arrays)
    teach_with("mine.csv")
    before = bytes_of(TEACHER.model)
    frame = pd.read_csv("mine.csv", dtype=str)
    frame.loc[frame["split"] != "train", "view"] = ""
    frame.to_csv("mine.csv", index=False, encoding="utf-8-sig")  # as a spreadsheet saves it
    teach_with("mine.csv")
    assert bytes_of(TEACHER.model) == before
    frame.loc[5, "view"] = "1.5"
    frame.to_csv("mine.csv", index=False)
    with pytest.raises(UserError, match="`mine.csv` has the view `1.5`; expected numbers from 0"):
        teach_with("mine.csv")


def test_an_id_in_two_splits_needs_the_split(project):
    arrays = table(answers_of_the_network(), by_view=False)
    path = Path("data/prepared/test_ids.json")
    ids = read_json(path, produced_by="-")["sample_ids"]
    twin = open_dataset().splits["train"].sample_ids[0]
    old, ids[0] = ids[0], twin
    path.write_text(json.dumps({"sample_ids": ids}), "utf-8")
    take_as_prepared()
    arrays["ids"] = np.where(arrays["ids"] == old, twin, arrays["ids"])
    with pytest.raises(UserError, match=f"2 of its ids are in two splits: `{twin}`, .*array"):
        teach_with(write_npz(arrays))
    with pytest.raises(UserError, match="add a column `split` of `train`, `validation`, `test`"):
        teach_with(write_csv(arrays))


def test_a_class_that_is_named_as_a_column_of_a_text_is_not_guessed_at(project):
    arrays = table(answers_of_the_network())
    path = Path("data/prepared/dataset.json")
    content = path.read_text("utf-8").replace('"bee"', '"view"')
    path.write_text(content, "utf-8")
    take_as_prepared()
    write_csv(
        {k: v for k, v in arrays.items() if k != "views"} | {"class_names": ["cat", "ant", "view"]}
    )
    with pytest.raises(UserError, match="the column `view` may be the class of that name or not"):
        teach_with("mine.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"cannot be read \(it is not an .npz file\)"),
        (pickle.dumps({"ids": []}), r"cannot be read \(it is not an .npz file\)"),
    ],
)
def test_a_file_that_is_no_npz_is_refused(project, content, message):
    Path("mine.npz").write_bytes(content)
    with pytest.raises(UserError, match=f"`mine.npz` {message}. Expected what `np.savez` writes"):
        teach_with("mine.npz")


def test_a_damaged_npz_is_refused(project):
    path = Path(write_npz(table(answers_of_the_network())))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match="`mine.npz` cannot be read .*Bad CRC-32"):
        teach_with("mine.npz")


def test_more_views_than_the_source_has_are_refused(project):
    teach_with(write_npz(table(answers_of_the_network())))
    change_params("views", count=4)
    with pytest.raises(UserError, match="has 3 views of the training images, but `views.count`"):
        run_stage("soft_targets")
    change_params("views", count=2)
    run_stage("soft_targets")
    assert opened().num_views == 2


def change_index(**values: object):
    def change():
        path = Path("mine/store.json")
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")

    return change


def change_shard(split: str, change, *, mend: bool):
    def changed():
        view = 1 if split == "train" else 0
        with h5py.File(f"mine/{split}_view{view:05d}_sample000000000.h5", "r+") as file:
            change(file)
            if mend:
                digest = hashlib.sha256(file["logits"][()].tobytes()).hexdigest()
                file.attrs["logits_sha256"] = np.bytes_(digest)

    return changed


def set_nan(file: h5py.File) -> None:
    file["logits"][7, 1] = np.nan


def set_canary(file: h5py.File) -> None:
    file["canaries"][0, 0] += 1
    file.attrs["canaries_sha256"] = np.bytes_(hashlib.sha256(file["canaries"][()]).hexdigest())


def probabilities(file: h5py.File) -> None:
    file["logits"][...] = torch.from_numpy(file["logits"][()]).float().softmax(1).half().numpy()


def put_instead(**options: object):
    """In place of the logits, a dataset that HDF5 would have to do more for than copy."""

    def change(file: h5py.File) -> None:
        logits = file["logits"][()]
        del file["logits"]
        if "shape" not in options:
            options["data"] = logits
        file.create_dataset("logits", **options)

    return change


def link_elsewhere(file: h5py.File) -> None:
    with h5py.File("mine/elsewhere.h5", "w") as other:
        file.copy("logits", other)
    del file["logits"]
    file["logits"] = h5py.ExternalLink("elsewhere.h5", "/logits")


def state_a_sum_of_any_length(file: h5py.File) -> None:
    file.attrs["logits_sha256"] = str(file.attrs["logits_sha256"])


@pytest.mark.parametrize(
    ("change", "stage_name", "message"),
    [
        (
            change_shard("test", put_instead(compression="gzip"), mend=False),
            "teacher",
            r"test_view00000_sample000000000.h5` has logits that are chunked, compressed or in an",
        ),
        (
            change_shard("test", put_instead(external="mine/raw"), mend=False),
            "teacher",
            r"test_view00000_sample000000000.h5` has logits that are chunked, compressed or in an",
        ),
        (  # all of it a fill value, in a file of some kilobytes
            change_shard("test", put_instead(shape=(2**40, 3), dtype="<f2"), mend=False),
            "teacher",
            r"`mine/test_view00000_sample000000000.h5` has logits float16 \[1099511627776, 3\]",
        ),
        (
            change_shard("test", link_elsewhere, mend=False),
            "teacher",
            r"`mine/test_view00000_sample000000000.h5` is damaged \(.*no `logits` of its own",
        ),
        (
            change_shard("test", state_a_sum_of_any_length, mend=False),
            "teacher",
            r"has no attribute `logits_sha256` of fixed length",
        ),
        (
            lambda: Path("mine/store.json").unlink(),
            "teacher",
            r"the folder `mine` has no `store.json`; expected a store",
        ),
        (
            lambda: Path("mine/store.json").write_text("[1]"),
            "teacher",
            r"`mine/store.json` cannot be read \(",
        ),
        (
            change_index(format_version=1),
            "teacher",
            r"has format version 1, and every key; expected version 2 with all of its keys",
        ),
        (change_index(num_views=None), "teacher", r"and lacks `num_views`; expected version 2"),
        (change_index(num_views=0), "teacher", r"has num_views 0; expected 1 or more"),
        (
            change_index(encoding="top_k", k=1),
            "teacher",
            r"has encoding top_k; expected dense, because validation and test need every logit",
        ),
        (
            change_index(dataset_fingerprint="e" * 64),
            "teacher",
            r"has dataset_fingerprint eeeeeeeeeeee…, but data/prepared \w{12}…\.",
        ),
        (
            change_index(class_names=["bee", "ant", "cat"]),
            "teacher",
            r"has class_names \['bee', 'ant', 'cat'\], but data/prepared \['ant', 'bee', 'cat'\]",
        ),
        (
            lambda: Path("mine/train_view00002_sample000000000.h5").unlink(),
            "teacher",
            r"`mine/train_view00002_sample000000000.h5` is absent \(.*Write it again",
        ),
        (
            lambda: Path("mine/test_view00000_sample000000000.h5").write_bytes(b"no HDF5"),
            "teacher",
            r"`mine/test_view00000_sample000000000.h5` is damaged \(",
        ),
        (
            change_shard(
                "validation",
                lambda f: f["logits"].write_direct(f["logits"][()][::-1].copy()),
                mend=False,
            ),
            "teacher",
            r"`mine/validation_view00000_sample000000000.h5` is damaged: its logits do not match",
        ),
        (change_shard("test", set_nan, mend=True), "teacher", r"`sample 7: nan for bee`"),
        (change_shard("test", probabilities, mend=True), "teacher", r"holds probabilities"),
        (
            lambda: shutil.copy(
                "mine/test_view00000_sample000000000.h5",
                "mine/validation_view00000_sample000000000.h5",
            ),
            "soft_targets",
            r"validation_view00000_sample000000000.h5` says split test; expected validation",
        ),
        (
            change_shard(
                "train",
                lambda f: f["logits"].write_direct(f["logits"][()][::-1].copy()),
                mend=False,
            ),
            "soft_targets",
            r"`mine/train_view00001_sample000000000.h5` is damaged: its logits do not match",
        ),
        (change_shard("train", set_nan, mend=True), "soft_targets", r"`sample 7: nan for bee`"),
        (
            change_shard("train", set_canary, mend=False),
            "soft_targets",
            r"has canaries that differ: the images or the augmentation have changed",
        ),
        (
            lambda: change_params("views", seed=8, policy="crop"),
            "soft_targets",
            r"`mine` was written for view policy crop_flip, but params.yaml says crop.\n"
            r"`mine` was written for views.seed 7, but params.yaml says 8.\nSet params.yaml to",
        ),
        (
            lambda: change_params("soft_targets", precision="bfloat16"),
            "soft_targets",
            r"`mine` was written for soft_targets.precision float32, but params.yaml says bfloat16",
        ),
    ],
)
def test_a_store_that_is_not_for_this_project_or_damaged_is_refused(
    project, change, stage_name, message
):
    set_teacher(write_store(answers_of_the_network()))
    change()
    if stage_name == "soft_targets":
        run_stage("teacher")
    before = bytes_of(STORE)
    with pytest.raises(UserError, match=message):
        run_stage(stage_name)
    assert bytes_of(STORE) == before


def test_a_store_of_several_shards_is_read_at_any_samples(project, monkeypatch):
    monkeypatch.setattr(family, "_CHUNK", 16)
    monkeypatch.setattr(foreign, "SHARD", 16)
    answers = answers_of_the_network()
    store = family.open_source(Path(write_store(answers)), open_dataset())
    samples = np.array([35, 3, 16, 15, 3])
    expected = answers["train"][2, samples].astype(np.float16)
    assert np.array_equal(store.rows("train", 2, samples), expected.astype(np.float32))


def test_a_shards_size_is_that_of_the_format():
    assert family._CHUNK == SHARD_SAMPLES


@pytest.mark.parametrize("path", ["mine.txt", "absent.npz"])
def test_what_is_neither_a_table_nor_a_store_is_refused(project, path):
    Path("mine.txt").touch()
    with pytest.raises(UserError, match=f"`{path}` is neither a table of logits"):
        teach_with(path)


def test_what_params_yaml_says_of_logits_is_checked_before_anything_runs(project):
    set_teacher("absent.npz")
    (problem,) = check.problems()
    assert problem == (
        "`params.yaml: teacher.checkpoint` is `absent.npz`, which is neither a table (.csv, .npz) "
        "nor the folder of a store; `weights: logits` needs one of them."
    )
    for path in (write_npz(table(answers_of_the_network())), write_store(answers_of_the_network())):
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
    teach_with(write_npz(table(answers_of_the_network())))
    with pytest.raises(UserError, match="`models/teacher` holds no network, but the logits"):
        checkpoint.load(TEACHER.model, produced_by="-")


def test_the_pages_python_writes_a_table_that_teaches(project):
    page = (ROOT / "docs/teachers.md").read_text("utf-8")
    block = page.partition("in the order of `class_names`:\n\n")[2].partition("\n\n- Rows")[0]
    answers, dataset = answers_of_the_network(), open_dataset()
    of_image = {
        sample_id: row
        for name, split in dataset.splits.items()
        for sample_id, row in zip(split.sample_ids, answers[name][0], strict=True)
    }
    Path("models/imported").mkdir()
    exec(dedent(block), {"predict": of_image.get, "class_names": dataset.class_names})
    teach_with("models/imported/answers.npz")
    found = load_file("predictions/teacher.safetensors")
    assert np.array_equal(found["test"], answers["test"][0])
