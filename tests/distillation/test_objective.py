"""`distillation` in params.yaml: each method with its own parameters, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import change_params, run_stage, take_as_prepared, write_params

from pipeline.commands.check import problems
from pipeline.distillation.params import METHODS, load_distillation
from pipeline.runtime.errors import UserError


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
    for method in METHODS:
        distil(method=method, **({"temperature": 3.0} if method == "kd" else {}))
        run_stage("student", "small")
        losses.append(train_loss())
    assert np.isfinite(losses).all()
    assert len(set(losses)) == len(losses)


def test_a_student_overrides_single_keys_of_its_sections_method(project):
    distil(method="dkd", beta=2.0)
    params = load_distillation({"alpha": 3.0}, "small")
    assert (params.method, params.alpha, params.beta, params.temperature) == ("dkd", 3.0, 2.0, 4.0)


def test_a_student_with_a_method_of_its_own_starts_from_that_methods_defaults(project):
    distil(method="kd", temperature=3.0, soft_label_weight=0.5, hard_label_weight=0.5)
    params = load_distillation({"method": "nkd", "gamma": 3.5}, "small")
    assert params.model_dump() == {
        "method": "nkd",
        "gamma": 3.5,
        "temperature": 1.0,
        "hard_label_weight": 1.0,
    }


def test_standardised_logits_bring_their_authors_weights_unless_others_are_given(project):
    distil(method="kd", standardize=True)
    params = load_distillation()
    assert (params.temperature, params.soft_label_weight) == (2.0, 9.0)
    distil(method="kd", standardize=True, temperature=3.0)
    params = load_distillation()
    assert (params.temperature, params.soft_label_weight) == (3.0, 9.0)


@pytest.mark.parametrize(
    ("distillation", "message"),
    [
        ({"method": "kd", "alpha": 1.0}, r"distillation.alpha` is unknown.* Method `kd`'s own"),
        ({"method": "dist", "standardize": True}, r"distillation.standardize` is unknown"),
        ({"method": "dkd", "soft_label_weight": 1.0}, r"soft_label_weight` is unknown"),
        ({"method": "dkdd"}, r"distillation.method` is 'dkdd'; did you mean `dkd` .*Known: kd, "),
        ({"method": 3}, r"distillation.method` is 3"),
        ({"method": "ttm", "gamma": 0.0}, r"distillation.gamma` is 0.0; expected greater than 0"),
        ({"method": "mlkd", "temperatures": []}, r"distillation.temperatures` is \[\]"),
        ({"method": "kd", "soft_label_weight": 0.0, "hard_label_weight": 0.0}, "nothing is left"),
    ],
)
def test_what_a_method_does_not_have_is_refused_by_name(project, distillation, message):
    distil(**distillation)
    with pytest.raises(UserError, match=message):
        load_distillation()
    assert any("distillation" in problem for problem in problems())


def test_a_mistake_of_a_student_is_told_where_it_stands(project):
    with pytest.raises(UserError, match=r"students.small.distillation.beta` is unknown"):
        load_distillation({"beta": 1.0}, "small")
    with pytest.raises(UserError, match=r"students.small.distillation.method` is 'kdd'"):
        load_distillation({"method": "kdd"}, "small")


@pytest.mark.parametrize(
    ("distillation", "why"),
    [
        ({"method": "logit_mse"}, "compares every logit"),
        ({"method": "dist"}, "correlates each class over the batch"),
        ({"method": "rld"}, "ranks above the label"),
        ({"method": "mlkd"}, "every class's probability"),
        ({"method": "kd", "standardize": True}, "the deviation over all logits"),
    ],
)
def test_methods_that_need_every_logit_refuse_a_top_k_store_before_anything_runs(
    project, distillation, why
):
    change_params("soft_targets", encoding="top_k", k=2)
    distil(**distillation)
    (problem,) = problems()
    assert why in problem


def test_a_training_refuses_them_too(project):
    change_params("soft_targets", encoding="top_k", k=2)
    run_stage("soft_targets")
    distil(method="logit_mse")
    with pytest.raises(UserError, match="student `small`: method .* needs every logit"):
        run_stage("student", "small")


def test_the_other_methods_learn_from_a_top_k_store(project):
    change_params("soft_targets", encoding="top_k", k=2)
    change_params("training", epochs=1)
    run_stage("soft_targets")
    for method in [name for name, model in METHODS.items() if not model.needs_every_logit]:
        distil(method=method)
        run_stage("student", "small")
        assert np.isfinite(train_loss())


def test_methods_that_need_one_label_refuse_mixed_views(project):
    change_params("views", mix={"method": "mixup", "alpha": 0.4})
    run_stage("soft_targets")
    for method in [name for name, model in METHODS.items() if model.needs_labels]:
        distil(method=method)
        (problem,) = problems()
        assert "needs one label for each image, but `views.mix` gives it two. Take one" in problem
        with pytest.raises(UserError, match=f"student `small`: method `{method}` needs one label"):
            run_stage("student", "small")


def test_methods_that_need_a_label_refuse_unlabelled_images(project):
    path = Path("data/prepared/train_labels.npy")
    labels = np.load(path)
    labels[::3] = -1
    np.save(path, labels)
    take_as_prepared()
    run_stage("soft_targets")
    for method in [name for name, model in METHODS.items() if model.needs_labels]:
        distil(method=method)
        with pytest.raises(UserError, match=r"needs a label for each image, but 12 of 36 training"):
            run_stage("student", "small")
