"""Every mistake in params.yaml is reported with its key."""

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from conftest import PARAMS, write_images, write_params
from dvc.utils.serialize import load_yaml
from import_closure import ROOT

from pipeline.commands import check
from pipeline.runtime.errors import UserError
from pipeline.runtime.params import load_section, read_params, read_yaml
from pipeline.students.params import TrainingParams, load_with_overrides
from pipeline.views.params import ViewsParams


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", per_class=3)
    return deepcopy(PARAMS)


def problems_of(params: dict) -> str:
    write_params(Path(), params)
    return "\n".join(check.problems())


def test_a_mistake_ends_with_one_message_and_no_traceback(params):
    params["views"]["seed"] = "x"
    write_params(Path(), params)
    result = subprocess.run(
        [sys.executable, "-m", "pipeline.commands.check"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr == "error: `params.yaml: views.seed` is 'x'; expected a valid integer.\n"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_a_recipe_lacks_only_the_files_that_a_user_provides(params, recipe):
    params = yaml.safe_load(recipe.read_text("utf-8"))
    params["teacher"]["family"] = "cifar_resnet"  # a recipe may define a new family
    problems = [line for line in problems_of(params).splitlines() if "not a file" not in line]
    assert all("does not exist" in line for line in problems)


def test_the_committed_params_have_no_problems(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert check.problems() == []


def test_good_params_have_no_problems(params):
    assert problems_of(params) == ""


def test_a_mistake_of_a_student_is_named_where_it_is_written(params):
    params["students"]["small"]["training"]["epoch"] = 3
    assert (
        "`params.yaml: students.small.training.epoch` is unknown; did you mean `epochs`? "
        "Known: batch_size, decay_factor, " in problems_of(params)
    )


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("views", "count", 0, "count is 0, but policy"),
        ("views", "count", "many", "`params.yaml: views.count` is 'many'"),
        (
            "views",
            "policy",
            "flip",
            "views.policy` is 'flip'; expected 'none', 'crop', 'crop_flip' or",
        ),
        ("views", "seed", True, "views.seed` is True; expected a valid integer"),
        ("teacher", "family", "resnet", "teacher.family`: there is no `pipeline/networks/resnet"),
        ("teacher", "checkpoint", None, "teacher.checkpoint` is empty"),
        ("training", "learning_rate", float("nan"), "learning_rate` is nan; expected"),
        ("training", "warmup_epochs", 2, "warmup_epochs is 2, but training ends after 2 epochs"),
        ("distillation", "temperature", 0, "temperature` is 0; expected greater than 0"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected(params, section, key, value, message):
    params[section][key] = value
    assert message in problems_of(params)


def test_all_problems_are_reported_at_once(params):
    params["views"]["seed"] = "x"
    params["training"]["epochs"] = 0
    params["students"]["small"]["network"] = {"name": "resnet8", "input_size": 2}
    message = problems_of(params)
    assert message.count("\n") == 2
    assert "`params.yaml: students.small.network.input_size` is 2" in message


def test_a_missing_section_is_named(params):
    del params["soft_targets"]
    assert "`params.yaml: soft_targets` is missing" in problems_of(params)


@pytest.mark.parametrize("name", ["Small", "a b", 3])
def test_a_student_name_with_other_characters_is_refused(params, name):
    params["students"][name] = params["students"].pop("small")
    assert f"`params.yaml: students` has the name {name!r}" in problems_of(params)


def test_a_students_values_override_the_defaults_key_by_key(params):
    write_params(Path(), params)
    training = load_with_overrides(TrainingParams, "training", {"epochs": 7}, "small")
    assert training.epochs == 7
    assert training.learning_rate == PARAMS["training"]["learning_rate"]
    params["training"]["epochs"] = "x"
    write_params(Path(), params)
    with pytest.raises(UserError, match=r"`params.yaml: training.epochs` is 'x'"):
        load_with_overrides(TrainingParams, "training", {"seed": 1}, "small")


def test_numbers_in_scientific_notation_are_numbers(params):
    write_params(Path(), params)
    path = Path("params.yaml")
    path.write_text(path.read_text().replace("learning_rate: 0.05", "learning_rate: 5e-4"))
    assert load_section(TrainingParams, "training").learning_rate == 5e-4


def read(text: str) -> dict:
    Path("params.yaml").write_text(text, "utf-8")
    return read_params()


@pytest.mark.parametrize(
    ("text", "message"), [("- 1", "expected a mapping of sections"), ("", "is empty")]
)
def test_a_file_that_is_not_a_mapping_is_refused(params, text, message):
    with pytest.raises(UserError, match=message):
        read(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {<<: *a}",
        "b0: &b0 {x: 1}\n"
        + "".join(f"b{n}: &b{n} {{<<: [{f'*b{n - 1}, ' * 10}]}}\n" for n in range(1, 9)),
        f"a: &a [{'*a, ' * 1000}]",
    ],
    ids=["a merge of itself", "merges of merges", "many aliases of itself"],
)
def test_aliases_without_end_are_refused_before_they_are_followed(params, text):
    with pytest.raises(UserError, match="more than 100,000 values, counting what aliases repeat"):
        read(text)


def test_an_alias_and_a_merge_of_a_few_values_are_read(params):
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [*a, *a]"
    a = {"x": 1, "y": 2}
    assert read(text) == {"a": a, "b": {"x": 3, "y": 2}, "c": [a, a]}


@pytest.mark.parametrize("path", [ROOT / "params.yaml", ROOT / "dvc.yaml"], ids=lambda p: p.name)
def test_yaml_has_the_values_that_dvc_reads(path):
    assert read_yaml(path) == load_yaml(path)


def test_scalars_have_the_values_that_dvc_reads(params):
    text = "x: [5e-4, 1e3, .inf, 1_000, 0o17, 0x1f, 1:30, yes, on, NO, ~, 017, 2024-01-02]\n"
    assert read(text) == load_yaml("params.yaml")


@pytest.mark.parametrize(("policy", "count"), [("crop_flip", 162), ("crop", 81), ("none", 1)])
def test_count_all_is_every_view_of_the_policy(params, policy, count):
    params["views"] |= {"policy": policy, "count": "all"}
    write_params(Path(), params)
    assert load_section(ViewsParams, "views").num_views == count


@pytest.mark.parametrize(
    "changed",
    [
        {"policy": "random_resized_crop"},
        {"rand_augment": {"operations": 1}},
        {"mix": {"method": "mixup"}},
    ],
)
def test_an_unlimited_policy_needs_a_count_of_views(params, changed):
    params["views"] |= changed | {"count": 1000}
    assert problems_of(params) == ""
    params["views"]["count"] = "all"
    assert "count is all, but the views of `" in problems_of(params)
    assert "have no end: set count to a number" in problems_of(params)
    params["views"]["count"] = 0
    assert "count is 0, but the views of `" in problems_of(params)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rand_augment", "yes", "rand_augment`: it is 'yes'; expected `none`, or a mapping"),
        ("rand_augment", {"operations": 0}, "views.rand_augment.operations` is 0; expected"),
        ("rand_augment", {"magnitud": 3}, "rand_augment.magnitud` is unknown; did you mean"),
        ("mix", {"method": "mixup", "alpha": 0}, "views.mix.alpha` is 0; expected greater than 0"),
        ("mix", {}, "views.mix.method` is missing"),
    ],
)
def test_a_mistake_in_rand_augment_or_mix_is_named(params, key, value, message):
    params["views"][key] = value
    assert message in problems_of(params)


@pytest.mark.parametrize("key", ["rand_augment", "mix"])
def test_rand_augment_and_mix_are_required(params, key):
    del params["views"][key]
    assert problems_of(params) == f"`params.yaml: views.{key}` is missing."


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": "adamw", "nesterov": True}, "nesterov belongs to optimizer `sgd`, but"),
        ({"milestones": [1]}, "milestones belongs to schedule `step`, but schedule is `cosine`"),
        (
            {"schedule": "constant", "milestones": [1], "decay_factor": 0.2},
            "milestones and decay_factor belong to schedule `step`, but schedule is `constant`: "
            "remove them (in a student, `milestones: null` removes a default)",
        ),
        ({"momentum": 0.0, "nesterov": True}, "nesterov is true, but momentum is 0"),
        ({"schedule": "step"}, "schedule `step` needs `milestones`"),
        ({"schedule": "step", "milestones": [4, 2]}, "milestones are [4, 2]; expected rising"),
        ({"schedule": "step", "milestones": [0]}, "rising epochs from 1 (the end of the warm-up"),
        ({"schedule": "step", "milestones": [9]}, "to 8 (the last epoch but one)"),
        (
            {"schedule": "step", "milestones": [2], "warmup_epochs": 3},
            "milestones are [2]; expected rising epochs from 3",
        ),
        ({"schedule": "step", "milestones": ["a"]}, "training.milestones.0` is 'a'; expected"),
        ({"ema_decay": 1.0}, "training.ema_decay` is 1.0; expected less than 1"),
        ({"gradient_clip_norm": 0.0}, "training.gradient_clip_norm` is 0.0; expected greater"),
        ({"label_smoothing": 1.0}, "training.label_smoothing` is 1.0; expected less than 1"),
        ({"weight_decay_exclusions": "bias"}, "is 'bias'; expected 'none' or 'norm_and_bias'"),
    ],
)
def test_contradictory_training_options_are_named_and_refused(params, values, message):
    for section in (params["training"], params["teacher"]["training"]):
        section |= {"epochs": 9}
    params["training"] |= values
    assert message in problems_of(params)
    if "label_smoothing" not in values:
        params["teacher"]["training"] |= values
        del params["training"]
        assert message.replace("training.", "teacher.training.") in problems_of(params)


def test_null_in_a_student_removes_a_default(params):
    params["training"] |= {"momentum": 0.8, "gradient_clip_norm": 1.0}
    overrides = {"optimizer": "adamw", "momentum": None, "gradient_clip_norm": None}
    params["students"]["small"]["training"] = overrides
    assert problems_of(params) == ""
    training = load_with_overrides(TrainingParams, "training", overrides, "small")
    assert (training.optimizer, training.gradient_clip_norm) == ("adamw", None)
    params["students"]["small"]["training"] = {"epochs": None}
    assert problems_of(params) == "`params.yaml: students.small.training.epochs` is missing."
