"""An edit runs the stages that depend on it and no other: real `dvc repro` in a clone."""

import json
import re
import shutil
from collections.abc import Callable

import numpy as np
import pytest
from clone import Clone, cloned, stages_run, timeless
from conftest import write_params
from import_closure import ROOT

from pipeline.data.prepared.dataset import open_dataset

NEW_FAMILY = """
from torch import nn

def build(network, num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes),
    )
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    root = tmp_path_factory.mktemp("clone")
    clone = cloned(root)
    assert clone.repro() == {
        "prepare",
        "teacher",
        "soft_targets",
        "baseline@small",
        "student@small",
        "robustness@small",
        "robustness_teacher",
        "speed",
        "compare",
    }
    return clone


def append(path: str, text: str) -> Callable[[Clone], None]:
    def edit(clone: Clone) -> None:
        file = clone.root / path
        file.write_text((file.read_text("utf-8") if file.exists() else "") + text, "utf-8")

    return edit


def set_param(*keys: str, value: object) -> Callable[[Clone], None]:
    def edit(clone: Clone) -> None:
        section = clone.params
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] = value

    return edit


def test_more_views_run_the_teacher_on_the_new_views_alone_and_fewer_views_run_nothing(clone):
    clone.params["views"]["count"] = 4
    write_params(clone.root, clone.params)
    output = clone.dvc("repro", "soft_targets")
    assert "resumes 5 finished shards (132 rows)" in output
    assert "ahead: 36 teacher passes" in output
    clone.params["views"]["count"] = 3
    write_params(clone.root, clone.params)
    assert "Running stage" not in clone.dvc("repro", "soft_targets")


ANOTHER_STUDENT = {
    "family": "cifar_resnet",
    "network": "resnet8",
    "training": {"seed": 5},
    "distillation": {},
}
SECOND = {"baseline@second", "student@second", "robustness@second"}
STUDENTS = {"student@small", "student@second"}
ROBUSTNESS = {"robustness@small", "robustness@second"}

# Edits in sequence: (name, edit, stages that run besides `speed` and `compare`).
EDITS = [
    ("a repeat", lambda clone: None, set()),
    ("another student", set_param("students", "second", value=ANOTHER_STUDENT), SECOND),
    (
        "one student's distillation",
        set_param("students", "second", "distillation", value={"temperature": 2.0}),
        {"student@second", "robustness@second"},
    ),
    (
        "the same reverted",
        set_param("students", "second", "distillation", value={}),
        set(),
    ),
    (
        "one student's training",
        set_param("students", "second", "training", value={"seed": 6}),
        SECOND,
    ),
    (
        "the defaults of distillation",
        set_param("distillation", "soft_label_weight", value=0.8),
        STUDENTS | ROBUSTNESS,
    ),
    (  # `small` sees the same view in its one epoch, and ends with the same weights
        "the count of views",
        set_param("views", "count", value=2),
        {"soft_targets", *STUDENTS, "robustness@second"},
    ),
    (
        "the teacher",
        set_param("teacher", "training", "seed", value=9),
        {"teacher", "robustness_teacher", "soft_targets", *STUDENTS, *ROBUSTNESS},
    ),
    ("a comment in the loss", append("pipeline/distillation/losses.py", "# a comment\n"), STUDENTS),
    ("a new family", append("pipeline/networks/mine.py", NEW_FAMILY), set()),
    (
        "a student of the new family",
        set_param("students", "third", value=ANOTHER_STUDENT | {"family": "mine"}),
        {"baseline@third", "student@third", "robustness@third"},
    ),
]
WITHOUT_EFFECT_ON_NETWORKS = {
    *("a repeat", "the same reverted", "a comment in the loss", "a new family"),
}

TRAININGS = {"student@small", "baseline@small"}
#: The stages that an edit of one file invalidates, but for those that follow from their outputs.
INVALIDATED = {
    "pipeline/comparison/report/page.py": {"compare"},
    "pipeline/distillation/losses.py": {"student@small"},
    "pipeline/store/reading/store.py": {"student@small"},
    "pipeline/students/loop.py": TRAININGS,
    "pipeline/commands/check.py": set(),
    "pipeline/data/sources/image_folder.py": {"prepare"},
    "pipeline/teacher/accuracy_gate.py": {"teacher"},
    "pipeline/teacher/imagenet_wordnet_ids.txt": {"teacher"},
    "pipeline/commands/diagnose_teacher.py": set(),
    "pipeline/store/writing/fidelity.py": {"soft_targets"},
    "pipeline/training/optimisation.py": {"teacher", *TRAININGS},
    "pipeline/networks/new_family.py": set(),
    "pipeline/networks/wide_resnet.py": set(),
    "pipeline/networks/__pycache__/new_family.pyc": set(),
}


def test_an_edit_invalidates_the_stages_of_its_folder_alone(clone):
    assert clone.invalidated() == set()
    for path, stages in INVALIDATED.items():
        file = clone.root / path
        before = file.read_bytes() if file.exists() else None
        file.parent.mkdir(exist_ok=True)
        file.write_bytes((before or b"") + b"# a comment\n")
        assert clone.invalidated() == stages, path
        file.unlink() if before is None else file.write_bytes(before)


def test_each_edit_runs_what_depends_on_it_and_nothing_else(clone):
    for name, edit, stages in EDITS:
        before = clone.outputs()
        edit(clone)
        ran = clone.repro()
        after = set() if name in WITHOUT_EFFECT_ON_NETWORKS else {"speed", "compare"}
        assert ran == stages | after, name
        if name == "a comment in the loss":
            assert clone.outputs() == before
        if name == "the same reverted":
            assert "student@second" in clone.restored


def test_lost_outputs_are_restored_without_running(clone):
    before = clone.outputs()
    for folder in ("data/prepared", "data/soft_targets", "models/teacher", "models/students"):
        shutil.rmtree(clone.root / folder)
    assert clone.repro() == set()
    assert clone.outputs() == before


def test_the_readmes_commands_on_metrics_and_plots_run(clone):
    """With `dvc metrics diff HEAD~1`, which lists what an edit changed by model and metric."""
    clone.commit("before")
    set_param("distillation", "temperature", value=3.0)(clone)
    clone.repro()
    clone.commit("after")
    readme = (ROOT / "README.md").read_text("utf-8")
    commands = re.findall(r"^    dvc ((?:metrics|plots) .+?)(?:  +#.*)?$", readme, re.MULTILINE)
    printed = {command: clone.dvc(*command.split()) for command in commands}
    assert len(printed) == 3
    shown = printed["metrics show metrics/teacher.json metrics/students metrics/baselines"]
    assert len(shown.strip().splitlines()) == 1 + 1 + 2 * len(clone.params["students"])
    assert re.search(r"metrics/students/small.json +test_nll ", printed["metrics diff HEAD~1"]), (
        printed["metrics diff HEAD~1"]
    )
    assert (clone.root / "dvc_plots/index.html").is_file()


def test_dvc_shows_the_metrics_and_plots_of_every_model(clone):
    metrics = json.loads(clone.dvc("metrics", "show", "--json"))[""]["data"]
    models = {f"metrics/{kind}/small.json" for kind in ("students", "baselines")}
    assert models | {"metrics/teacher.json", "metrics/comparison.json"} <= metrics.keys()
    plots = json.loads(clone.dvc("plots", "show", "--json"))["data"]
    curves = plots["metrics/training_curves.csv"][0]["content"]["data"]["values"]
    assert {row["role"] for row in curves if row["student"] == "small"} == {"distilled", "baseline"}
    models = plots["metrics/comparison.csv"][0]["content"]["data"]["values"]
    assert {"teacher", "small"} <= {row["model"] for row in models}


def test_parallel_trainings_give_the_lock_and_the_bytes_of_sequential_ones(clone):
    twin = clone.twin()
    for each in (clone, twin):
        set_param("students", "small", "training", value={"seed": 8})(each)
        set_param("students", "second", "distillation", value={"temperature": 2.5})(each)
    exports = {f"export@{name}" for name in clone.params["students"]}
    wanted = {"student@small", "baseline@small", "student@second", *ROBUSTNESS, "speed", "compare"}
    wanted |= exports
    assert clone.repro("--all-pipelines") == wanted
    result = twin.make_students(jobs=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert stages_run(result.stdout) == wanted
    assert "student@second:   epoch 1/1" in result.stdout
    assert "agreement" in result.stdout.partition("Running stage 'compare'")[2]  # the table, last
    assert timeless(twin.lock()["stages"]) == timeless(clone.lock()["stages"])
    assert timeless(twin.outputs()) == timeless(clone.outputs())
    assert not stages_run(twin.dvc("repro", "--dry"))


def test_a_failing_student_is_named_and_does_not_stop_the_others(clone):
    set_param("students", "small", "distillation", value={"temperature": 3.5})(clone)
    set_param("students", "second", "network", value="resnet9")(clone)
    result = clone.make_students(jobs=2)
    assert result.returncode != 0
    assert "2 of 6 failed: student@second, baseline@second." in result.stderr
    assert "student@second: error: family `cifar_resnet` has no network `resnet9`" in result.stdout
    assert "Running stage 'compare'" not in result.stdout
    set_param("students", "second", "network", value="resnet8")(clone)
    # These stages waited for the trainings.
    assert clone.repro() == {"robustness@small", "speed", "compare"}


@pytest.mark.slow
def test_a_table_of_logits_in_another_order_trains_no_student_again(clone):
    """Its bytes differ, but its logits do not."""
    prepared = clone.root / "data/prepared"
    splits = open_dataset(prepared).splits
    ids = np.array([sample_id for split in splits.values() for sample_id in split.sample_ids])
    labels = np.concatenate([split.labels for split in splits.values()])
    table = {"ids": ids, "logits": 5.0 * np.eye(3)[labels]}
    logits = {"family": "logits", "network": "labels", "weights": "logits"}
    clone.params["teacher"] |= logits | {"checkpoint": "models/imported/labels.npz"}
    write_params(clone.root, clone.params)
    ran = []
    for order in (slice(None), slice(None, None, -1)):
        rows = {name: array[order] for name, array in table.items()}
        np.savez(
            clone.root / "models/imported/labels.npz", class_names=["ant", "bee", "cat"], **rows
        )
        ran.append(stages_run(clone.dvc("repro", "student@small")))
    assert ran == [{"teacher", "soft_targets", "student@small"}, {"teacher", "soft_targets"}]


def test_a_student_is_exported_again_only_when_its_weights_change(clone):
    clone.repro("export@small")
    append("pipeline/distillation/losses.py", "# another comment\n")(clone)
    assert clone.repro("export@small") == {"student@small"}  # to the same bytes
    set_param("students", "small", "distillation", value={"temperature": 5.0})(clone)
    assert clone.repro("export@small") == {"student@small", "export@small"}
