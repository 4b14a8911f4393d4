"""An edit runs the stages that depend on it and no other: by DVC's status, and by `dvc repro`."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import yaml
from clone import Clone, cloned, committed, run_command_forked, stages_run
from conftest import PARAMS, write_params
from import_closure import ROOT

from pipeline.data.prepared.dataset import open_dataset
from pipeline.plan.forecast import Forecast
from pipeline.plan.words import lines
from pipeline.teacher.params import TeacherParams

CLOCKED = {"speed", "compare"}
TRAININGS = {"student@small", "baseline@small"}
#: The student, and its quantisation-aware training, which ends at once where there is none.
DISTILLED = {"student@small", "int8_training@small"}
EXPORTS = {"export_teacher", "export@small"}
ROBUSTNESS = {"robustness_teacher", "robustness@small"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which everything has run. A test restores what it changes, or makes a twin."""
    return committed(tmp_path_factory)


def test_a_new_clone_runs_every_stage_and_the_plan_names_the_teacher_first(tmp_path):
    clone = cloned(tmp_path)
    assert clone.invalidated() == {
        *("prepare", "teacher", "soft_targets", "robustness_teacher", "speed", "compare"),
        *(*TRAININGS, "int8_training@small", "robustness@small", *EXPORTS),
    }
    shutil.rmtree(tmp_path / "images")
    assert clone.plan().splitlines() == [
        "The teacher runs: it has never run.",
        "  teacher: trains for 6 epochs on every training image.",
        "  soft_targets: up to 3 views of every training image, and every held-out image once. "
        "Views that are in .scratch are not computed again.",
        "1 student is trained: small.",
        "1 baseline is trained: small.",
        "8 other stages run: prepare; export_teacher; int8_training@small; export@small; "
        "robustness_teacher; robustness@small; speed; compare.",
        "`prepare` cannot run: `images` is missing.",
        "Why:",
        "  it has never run: prepare; teacher; soft_targets; baseline@small; student@small; "
        "export_teacher; int8_training@small; export@small; robustness_teacher; "
        "robustness@small; speed; compare",
        "  `images` is missing: prepare",
    ]


def test_the_plan_counts_the_labelled_images_of_a_teacher_that_is_trained():
    training = {"epochs": 6, "batch_size": 8, "learning_rate": 0.1, "policy": "crop", "seed": 1}
    teacher = TeacherParams(
        family="cifar_resnet", network="resnet8", weights="train", checkpoint="-", training=training
    )
    sizes = {"train": 2000, "validation": 500, "test": 2500}
    for labelled, text in ((2000, "2,000"), (100, "the 100 labelled ones of 2,000")):
        run = [Forecast(stage, "runs") for stage in ("prepare", "teacher", "soft_targets")]
        _, of_teacher, of_store, *_ = lines(run, teacher, 8, {**sizes, "labelled": labelled})
        assert of_teacher == f"  teacher: trains for 6 epochs on {text} training images."
        assert "8 views of 2,000 training images, and 3,000 held-out images once" in of_store


@pytest.mark.parametrize("forked", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_parallel_stages_give_the_lock_and_the_bytes_of_sequential_ones(clone, forked):
    lock, outputs = clone.lock()["stages"], clone.outputs()
    forgotten = {*TRAININGS, "compare"}
    others = {stage: entry for stage, entry in lock.items() if stage not in forgotten}
    (clone.root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": others}))
    runs = clone.root / ".dvc/cache/runs"
    kept = runs.rename(clone.root / ".dvc/runs_of_before")
    result = clone.make_repro(jobs=2, forked=forked)
    assert result.returncode == 0, result.stdout + result.stderr
    assert stages_run(result.stdout) == forgotten
    assert "student@small:   epoch 1/2" in result.stdout
    comparison = result.stdout.partition("Running stage 'compare'")[2]  # it is printed last, once
    assert result.stdout.count("teacher: test accuracy") == 1 == comparison.count("agreement")
    assert clone.lock()["stages"] == lock
    assert clone.outputs() == outputs
    assert clone.invalidated() == set()
    shutil.copytree(kept, runs, dirs_exist_ok=True)


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


@pytest.mark.slow
def test_more_views_run_the_teacher_on_the_new_views_alone_and_fewer_views_run_nothing(
    clone, tmp_path
):
    clone = clone.twin(tmp_path / "twin")
    first = clone.run(sys.executable, "-m", "pipeline.stages.soft_targets")
    assert first.returncode == 0, first.stderr
    clone.params["views"]["count"] = 4
    write_params(clone.root, clone.params)
    output = clone.dvc("repro", "soft_targets")
    assert "resumes 5 finished shards (132 rows)" in output
    assert "ahead: 36 teacher passes" in output
    clone.params["views"]["count"] = 3
    write_params(clone.root, clone.params)
    assert "Running stage" not in clone.dvc("repro", "soft_targets")


LOSS = "pipeline/distillation/losses.py"


def test_an_edit_runs_what_depends_on_it_and_nothing_else(clone):
    set_param("students", "small", "distillation", value={"temperature": 2.0})(clone)
    assert clone.invalidated() == {*DISTILLED, "export@small", *CLOCKED}
    changed = "`students.small.distillation.temperature`"
    assert clone.plan().splitlines() == [
        "The teacher does not run.",
        "1 student is trained: small.",
        "4 other stages run: int8_training@small; export@small; speed; compare.",
        "After these, only if what they read changes: robustness@small.",
        "6 stages are up to date.",
        "Why:",
        f"  {changed} is new: student@small; int8_training@small; export@small; speed; compare",
    ]
    assert clone.repro("student@small", here=True) == {"student@small"}
    assert clone.invalidated() == {"int8_training@small", "export@small", *CLOCKED}
    set_param("students", "small", "distillation", value={})(clone)
    assert clone.plan().splitlines() == [
        "The teacher does not run.",
        "No student is trained.",
        "After these, only if what they read changes: speed; compare.",
        "Restored from DVC's cache, without a run: student@small.",
        "9 stages are up to date.",
    ]
    assert clone.repro("student@small", here=True) == set()
    assert "student@small" in clone.restored
    assert clone.invalidated() == set()


def test_an_edit_without_effect_on_the_weights_runs_nothing_after_the_training(clone, monkeypatch):
    monkeypatch.setattr("clone.run_command_here", run_command_forked)
    before = clone.outputs()
    append(LOSS, "# a comment\n")(clone)
    assert clone.repro(here=True) == DISTILLED
    assert clone.outputs() == before


#: The stages that an edit of one file invalidates, but for those that follow from their outputs.
INVALIDATED = {
    "pipeline/comparison/report/page.html": {"compare"},
    "pipeline/comparison/report/style.css": {"compare"},
    "pipeline/comparison/report/sort_tables.js": {"compare"},
    "pipeline/comparison/decision.py": {"compare"},
    "pipeline/comparison/measurement/statistics.py": {*EXPORTS, *ROBUSTNESS, "compare"},
    "pipeline/comparison/measurement/corruptions.py": {*ROBUSTNESS, "compare"},
    "pipeline/comparison/measurement/latency.py": {*ROBUSTNESS, "speed", "compare"},
    "pipeline/export/to_onnx.py": EXPORTS,
    "pipeline/export/params.py": {"int8_training@small", *EXPORTS},
    "pipeline/export/running/onnx_model.py": {*EXPORTS, *ROBUSTNESS, "speed"},
    "pipeline/int8_training/fake_quantisation.py": {"int8_training@small"},
    LOSS: DISTILLED,
    "pipeline/store/reading/store.py": DISTILLED,
    "pipeline/students/loop.py": {*TRAININGS, *DISTILLED},
    "pipeline/commands/check.py": set(),
    "pipeline/data/sources/image_folder.py": {"prepare"},
    "pipeline/teacher/accuracy_gate.py": {"teacher"},
    "pipeline/initial_weights/imagenet_wordnet_ids.txt": {"teacher", *TRAININGS, *DISTILLED},
    "pipeline/students/initial_network.py": {*TRAININGS, *DISTILLED},
    "pipeline/commands/diagnose_teacher.py": set(),
    "pipeline/store/writing/fidelity.py": {"soft_targets"},
    "pipeline/training/optimisation.py": {"teacher", *TRAININGS, *DISTILLED},
    "pipeline/networks/wide_resnet.py": set(),
    "pipeline/networks/new_family.py": set(),
    "pipeline/networks/__pycache__/new_family.pyc": set(),
    # Outputs: the stage that wrote one, and those that read it.
    "models/teacher/weights.safetensors": {
        *("teacher", "soft_targets", "export_teacher", "speed"),
    },
    "data/soft_targets/store.json": {"soft_targets", *DISTILLED, "compare"},
    "models/students/small/weights.safetensors": {
        *(*DISTILLED, "export@small", "speed"),
    },
    "models/exported/small.onnx": {"export@small", "robustness@small", *CLOCKED},
    "models/exported/teacher/teacher.json": {*("export_teacher", "robustness_teacher"), *CLOCKED},
    "predictions/robustness/teacher.safetensors": {"robustness_teacher", "compare"},
}
SECOND = {
    f"{stage}@second" for stage in ("baseline", "student", "int8_training", "robustness", "export")
}
#: The same of parameters; `compare` reads all of them, and `speed` those of the students.
INVALIDATED_BY_PARAMS = {
    ("students", "second"): (PARAMS["students"]["small"], SECOND),
    ("students", "small", "training"): (
        {"seeds": [2, 6]},
        {*TRAININGS, *DISTILLED, "export@small"},
    ),
    ("students", "small", "network"): (  # other weights to start from
        {"name": "resnet8", "weights": {"path": "models/imported/r8.pth", "sha256": "0" * 64}},
        {*TRAININGS, *DISTILLED, "export@small"},
    ),
    ("students", "small", "export"): (
        {"precision": "int8"},
        {"int8_training@small", "export@small"},
    ),
    ("export", "precision"): ("int8", {"int8_training@small", *EXPORTS}),
    ("export", "largest_loss"): (0.4, EXPORTS),
    ("distillation", "soft_label_weight"): (0.8, DISTILLED),
    ("views", "count"): (2, {"soft_targets", *DISTILLED, "export@small"}),
    ("teacher", "training", "seed"): (9, {"teacher"}),
    ("dataset", "split_seed"): (9, {"prepare", *EXPORTS}),
}


def test_an_edit_invalidates_the_stages_of_its_folder_alone(clone):
    with clone.watched() as invalidated:
        assert invalidated() == set()
        for path, stages in INVALIDATED.items():
            file = clone.root / path
            before = file.read_bytes() if file.exists() else None
            file.parent.mkdir(exist_ok=True)
            file.write_bytes((before or b"") + b"# a comment\n")
            assert invalidated() == stages, path
            file.unlink() if before is None else file.write_bytes(before)
    assert clone.invalidated() == set()


def test_an_edit_of_a_parameter_invalidates_the_stages_that_read_it(clone):
    before = clone.params
    for keys, (value, stages) in INVALIDATED_BY_PARAMS.items():
        clone.params = deepcopy(before)
        set_param(*keys, value=value)(clone)
        assert clone.invalidated() - CLOCKED == stages, keys
    clone.params = before
    assert clone.invalidated() == set()


#: A changed parameter, and what the plan says of it.
PLANS = {
    ("teacher", "training", "seed"): (
        9,
        [
            "The teacher runs: `teacher.training.seed`: 1 -> 9.",
            "  teacher: trains for 6 epochs on 36 training images.",
            "  soft_targets, if what it reads changes: up to 3 views of 36 training images, and 24 "
            "held-out images once: 132 passes. Views that are in .scratch are not computed again.",
            "Up to 1 student is trained, if what they read changes: small.",
        ],
    ),
    ("dataset", "split_seed"): (
        9,
        ["The teacher may run: only if `prepare` writes other bytes than before."],
    ),
    ("students", "second"): (
        PARAMS["students"]["small"],
        [
            "The teacher does not run.",
            "1 student is trained: second.",
            "1 baseline is trained: second.",
            "5 other stages run: int8_training@second; export@second; robustness@second; speed; "
            "compare.",
            "10 stages are up to date.",
            "Why:",
            "  it has never run: baseline@second; student@second; int8_training@second; "
            "export@second; robustness@second",
            "  `students.second` is new: speed; compare",
        ],
    ),
}


def test_the_plan_says_what_a_change_will_run_and_why_and_the_teacher_first(clone):
    assert clone.plan() == "Nothing runs: 12 stages are up to date.\n"
    before = clone.params
    for keys, (value, said) in PLANS.items():
        clone.params = deepcopy(before)
        set_param(*keys, value=value)(clone)
        assert clone.plan().splitlines()[: len(said)] == said, keys
    clone.params = before
    write_params(clone.root, before)


def test_lost_outputs_are_restored_without_running(clone):
    before = clone.outputs()
    for folder in ("data/prepared", "data/soft_targets", "models/teacher", "models/students"):
        shutil.rmtree(clone.root / folder)
    assert clone.repro(here=True) == set()
    assert clone.outputs() == before


def test_the_commands_of_the_page_on_metrics_and_plots_run(clone):
    """With `dvc metrics diff HEAD~1`, which lists what an edit changed by model and metric."""
    clone.commit("before")
    metrics = clone.root / "metrics/students/small.json"
    before = metrics.read_text("utf-8")
    metrics.write_text(json.dumps(json.loads(before) | {"test_nll": 0.5}), "utf-8")
    clone.commit("after")
    page = (ROOT / "docs/comparing.md").read_text("utf-8")
    page = page.partition("\n## Metrics across commits\n")[2].partition("\n## ")[0]
    commands = re.findall(r"^    dvc ((?:metrics|plots) .+?)(?:  +#.*)?$", page, re.MULTILINE)
    commands = [command.replace("resnet8", "small") for command in commands]
    for kind in ("students", "baselines"):  # of a student that was removed from params.yaml
        (clone.root / f"metrics/{kind}/removed.json").write_text('{"test_nll": 0.5}')
    printed = {command: clone.dvc(*command.split()) for command in commands}
    assert len(printed) == 4
    assert not [command for command, text in printed.items() if "removed" in text]
    shown = "metrics/students/small.json metrics/baselines/small.json"
    shown = printed[f"metrics show metrics/teacher.json {shown}"]
    assert len(shown.strip().splitlines()) == 1 + 1 + 2
    assert clone.invalidated() >= {"compare"}  # which depends on the folders
    for kind in ("students", "baselines"):
        (clone.root / f"metrics/{kind}/removed.json").unlink()
    difference = printed["metrics diff HEAD~1"]
    assert re.search(r"metrics/students/small.json +test_nll ", difference), difference
    assert (clone.root / "dvc_plots/index.html").is_file()
    metrics.write_text(before, "utf-8")


def test_dvc_shows_the_metrics_of_every_model(clone):
    metrics = json.loads(clone.dvc("metrics", "show", "--json"))[""]["data"]
    models = {f"metrics/{kind}/small.json" for kind in ("students", "baselines")}
    assert models | {"metrics/teacher.json", "metrics/comparison.json"} <= metrics.keys()
    assert "files" not in metrics["metrics/comparison.json"]["data"]  # rows of a plot


@pytest.mark.slow
def test_a_failing_student_is_named_and_stops_only_what_reads_from_it(clone, tmp_path):
    clone = clone.twin(tmp_path / "twin")
    set_param("students", "small", "distillation", value={"temperature": 3.5})(clone)
    set_param("students", "second", value=PARAMS["students"]["small"] | {"network": "resnet9"})(
        clone
    )
    write_params(clone.root, clone.params)
    result = clone.run(sys.executable, "-m", "pipeline.commands.repro", "--jobs", "2")
    assert result.returncode != 0
    assert "2 stages failed: baseline@second, student@second." in result.stderr
    assert "student@second: error: family `cifar_resnet` has no network `resnet9`" in result.stdout
    exported = {"export@small", "robustness@small"}
    trained = {"student@small", "student@second", "baseline@second"}
    assert stages_run(result.stdout) - {"int8_training@small"} == trained | exported
    clone.params["students"].pop("second")
    assert clone.invalidated() == CLOCKED  # nothing else waited for the failed student


@pytest.mark.slow
def test_results_of_a_removed_student_are_removed_when_asked_and_restored_with_the_student(
    clone, tmp_path
):
    clone = clone.twin(tmp_path / "twin")
    second, command = PARAMS["students"]["small"], "pipeline.commands.remove_results"
    clone.params["students"]["second"] = second
    assert clone.repro("--all-pipelines") == {*SECOND, *CLOCKED}
    weights = clone.root / "models/students/second/weights.safetensors"
    before = weights.read_bytes()
    del clone.params["students"]["second"]
    write_params(clone.root, clone.params)
    assert "metrics/students/second.json" not in clone.dvc("metrics", "show")
    removed = clone.run(sys.executable, "-m", command, "--remove")
    assert "removed models/students/second" in removed.stdout, removed.stderr
    assert not list(clone.root.glob("metrics/**/second.*"))
    assert clone.repro("--all-pipelines") <= CLOCKED
    clone.params["students"]["second"] = second
    assert clone.repro("--all-pipelines") <= CLOCKED
    assert weights.read_bytes() == before
    assert (clone.root / "metrics/students/second.json").is_file()


@pytest.mark.slow
def test_a_table_of_logits_in_another_order_trains_no_student_again(clone, tmp_path):
    """Its bytes differ, but its logits do not."""
    clone = clone.twin(tmp_path / "twin")
    prepared = clone.root / "data/prepared"
    splits = open_dataset(prepared).splits
    ids = np.array([sample_id for split in splits.values() for sample_id in split.sample_ids])
    labels = np.concatenate([split.labels for split in splits.values()])
    table = {"ids": ids, "logits": 5.0 * np.eye(3)[labels]}
    logits = {"family": "logits", "network": "labels", "weights": "logits"}
    clone.params["teacher"] |= logits | {"checkpoint": "models/imported/logits"}
    write_params(clone.root, clone.params)
    ran = []
    for order in (slice(None), slice(None, None, -1)):
        rows = {name: array[order] for name, array in table.items()}
        np.savez(clone.root / "labels.npz", class_names=["ant", "bee", "cat"], **rows)
        result = clone.run(sys.executable, "-m", "pipeline.commands.import_logits", "labels.npz")
        assert result.returncode == 0, result.stderr
        ran.append(stages_run(clone.dvc("repro", "student@small")))
    assert ran == [{"teacher", "soft_targets", "student@small"}, {"teacher", "soft_targets"}]
