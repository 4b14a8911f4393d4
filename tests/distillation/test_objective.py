"""`distillation` in params.yaml: each method with its own parameters, and what it refuses."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import change_params, run_stage, take_as_prepared, write_params
from pydantic import ValidationError

from pipeline.commands.check import problems
from pipeline.distillation.objective import paired_loss, student_loss
from pipeline.distillation.params import (
    METHODS,
    DistillationParams,
    check_method,
    load_distillation,
)
from pipeline.runtime.errors import UserError
from pipeline.students.loop import TrainingBatch

CPU = torch.device("cpu")


def distil(**distillation: object) -> None:
    """Set the section, whole."""
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    params["distillation"] = distillation
    write_params(Path(), params)


def train_loss() -> float:
    return float(
        Path("metrics/history/students/small.csv").read_text().splitlines()[1].split(",")[2]
    )


def test_a_student_learns_by_every_method_and_each_is_a_loss_of_its_own(project):
    change_params("training", epochs=1)
    losses = [train_loss()]  # by kd, with weights that are not those of its authors
    for method in (name for name, model in METHODS.items() if not model.needs_pairs):
        distil(method=method, **({"temperature": 3.0} if method == "kd" else {}))
        run_stage("student", "small")
        losses.append(train_loss())
    assert np.isfinite(losses).all()
    assert len(set(losses)) == len(losses)


def test_a_student_overrides_keys_of_the_section_and_another_method_starts_from_its_defaults(
    project,
):
    distil(method="dkd", beta=2.0)
    params = load_distillation({"alpha": 3.0}, "small")
    assert (params.method, params.alpha, params.beta, params.temperature) == ("dkd", 3.0, 2.0, 4.0)
    params = load_distillation({"method": "nkd", "gamma": 3.5}, "small")
    expected = {"method": "nkd", "gamma": 3.5, "temperature": 1.0, "hard_label_weight": 1.0}
    assert params.model_dump() == expected | {"paired_views": "both"}
    # Standardised logits bring their authors' weights, unless others are given.
    distil(method="kd", standardize=True, temperature=3.0)
    params = load_distillation()
    assert (params.temperature, params.soft_label_weight) == (3.0, 9.0)
    assert load_distillation({"temperature": None}, "small").temperature == 2.0


def test_what_a_method_does_not_have_is_refused_where_it_is_written(project):
    for distillation, message in (
        ({"method": "kd", "alpha": 1.0}, r"distillation.alpha` is unknown"),
        ({"method": "dkdd"}, r"distillation.method` is 'dkdd'; did you mean `dkd` .*Known: kd, "),
        ({"method": 3}, r"distillation.method` is 3"),
    ):
        distil(**distillation)
        with pytest.raises(UserError, match=f"params.yaml: {message}"):
            load_distillation()
        assert any("distillation" in problem for problem in problems())
        distil(method="kd")
        with pytest.raises(UserError, match=f"students.small.{message}"):
            load_distillation(distillation, "small")
    with pytest.raises(UserError, match="nothing is left to learn from"):
        load_distillation({"soft_label_weight": 0.0, "hard_label_weight": 0.0}, "small")


def test_weights_that_leave_nothing_to_learn_from_are_refused_and_each_alone_is_not():
    of_the_teacher = {}
    for method, model in METHODS.items():
        groups = [set(group) for group in model.term_weights]
        weights = {key for key in model.model_fields if key.endswith("_weight")}
        assert weights <= {"hard_label_weight"}.union(*groups)
        of_the_teacher[method] = groups
        for group in groups:
            zero = dict.fromkeys({*group, "hard_label_weight"}, 0.0)
            with pytest.raises(ValidationError, match="are all 0: nothing is left to learn from"):
                model(method=method, **zero)
            for weight in zero:
                model(method=method, **zero | {weight: 0.5})
    assert of_the_teacher["dist"] == [{"soft_label_weight"}, {"beta", "gamma"}]
    assert of_the_teacher["crld"] == [{"within_view_weight", "cross_view_weight"}]
    assert of_the_teacher["dkd"] == of_the_teacher["rld"] == [{"alpha", "beta"}]


def largest_gradient(params: DistillationParams) -> float:
    """Of the loss of random logits."""
    student = torch.randn(2, 6, 4, requires_grad=True)
    rows = torch.randn(2, 6, 4).numpy()
    of_views = paired_loss if params.needs_pairs else student_loss
    loss = of_views(params, lambda view, samples: (rows[view], None), CPU)
    batch = TrainingBatch(30, 0, np.arange(6), torch.arange(6) % 4)
    loss(student if params.needs_pairs else student[0], batch).backward()
    return float(student.grad.abs().max())


@pytest.mark.parametrize("method", ["dkd", "rld", "crld", "dist"])
def test_without_the_weights_of_its_terms_a_method_has_no_gradient(method):
    params = METHODS[method](method=method, hard_label_weight=0.0)
    assert largest_gradient(params) > 0
    for group in params.term_weights:
        assert largest_gradient(params.model_copy(update=dict.fromkeys(group, 0.0))) == 0


STORES = [
    {"encoding": encoding, "mixed": mixed, "paired": paired, "labels": labels}
    for encoding in ("dense", "top_k")
    for mixed, paired in ((False, False), (True, False), (False, True))
    for labels in ([0, 1], [0, -1])
]


def refusals(params: DistillationParams, **store: Any) -> str:
    try:
        check_method(params, "small", **{"encoding": "dense", "mixed": False} | store)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("method", ["kd", "dkd", "rld", "mlkd"])
def test_standardised_logits_of_two_classes_are_refused(method):
    """They are always +0.71 and -0.71."""
    params = METHODS[method](method=method, standardize=True)
    assert "of two logits their order alone" in refusals(params, num_classes=2)
    assert refusals(params, num_classes=3) == ""
    assert refusals(METHODS[method](method=method), num_classes=2) == ""


def test_nkd_refuses_rows_that_are_decoded_for_another_temperature_than_1():
    for temperature in (1, 3, {"first": 1.0, "last": 2.0}):
        params = METHODS["nkd"](method="nkd", temperature=temperature)
        said = "the label's probability at T = 1" in refusals(params, encoding="top_k")
        assert said == (temperature != 1)
        assert refusals(params) == ""


@pytest.mark.parametrize("method", METHODS)
def test_a_method_refuses_what_its_formula_cannot_use(method):
    model = METHODS[method]
    params = model(method=method)
    assert ("needs pairs of views, but" in refusals(params)) == model.needs_pairs
    assert refusals(params, labels=[0, 1], paired=True) == ""
    every_logit = "needs every logit, but `soft_targets.encoding` is top_k"
    assert (every_logit in refusals(params, encoding="top_k")) == bool(model.needs_every_logit)
    for store, found in (
        ({"mixed": True}, "`views.mix` gives it two. Take one of kd, "),
        ({"labels": [0, -1, 2]}, "1 of 3 training images have none. Take one of kd, "),
        ({"labels": [-1], "paired": True}, "1 of 1 training images have none. Take one of kd, "),
    ):
        one_label = f"needs one label for each image, but {found}"
        assert (one_label in refusals(params, **store)) == model.needs_labels
        if model.needs_labels:
            assert ("crld" in refusals(params, **store)) == store.get("paired", False)
    for store in STORES:
        named = re.findall(r"take one of ([\w, ]*)", refusals(params, **store), re.IGNORECASE)
        for other in METHODS.keys() & {name for names in named for name in names.split(", ")}:
            assert refusals(METHODS[other](method=other), **store) == ""
    if "standardize" in model.model_fields:
        standardized = model(method=method, standardize=True)
        assert "the deviation over all logits" in refusals(standardized, encoding="top_k")
    if "sort_teacher" in model.model_fields:
        by_label = model(method=method, sort_teacher=True)
        assert "moves logits between classes" in refusals(by_label, encoding="top_k")
        assert "has `sort_teacher`, which needs one label" in refusals(by_label, labels=[0, -1])


def test_a_training_refuses_a_store_and_labels_that_its_method_cannot_use(project):
    path = Path("data/prepared/train_labels.npy")
    labels = np.load(path)
    labels[::3] = -1
    np.save(path, labels)
    take_as_prepared()
    change_params("views", mix={"method": "mixup", "alpha": 0.4})
    change_params("soft_targets", encoding="top_k", k=2)
    run_stage("soft_targets")
    distil(method="rld")
    with pytest.raises(UserError) as raised:
        run_stage("student", "small")
    lines = str(raised.value).splitlines()
    for line, reason in zip(
        lines, ("top_k: it leaves out", "gives it two", "12 of 36 training images"), strict=True
    ):
        assert line.startswith("student `small`: method `rld` needs ")
        assert reason in line
    assert problems() == lines[:2]
