"""Every mistake in params.yaml is reported with its key."""

from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from conftest import PARAMS, write_images, write_params
from dvc.utils.serialize import load_yaml
from import_closure import ROOT
from stage_process import start_module

from pipeline.commands import check
from pipeline.export.params import ExportParams, load_export
from pipeline.runtime.errors import UserError
from pipeline.runtime.params import (
    load_section,
    load_with_overrides,
    paired_views,
    read_params,
    read_yaml,
)
from pipeline.students.params import TrainingSection
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
    process = start_module("pipeline.commands.check")
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert stderr == "error: `params.yaml: views.seed` is 'x'; expected a valid integer.\n"


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_a_recipe_lacks_only_the_files_that_a_user_provides(params, recipe):
    params = yaml.safe_load(recipe.read_text("utf-8"))
    params["teacher"]["family"] = "cifar_resnet"  # a recipe may define a new family
    problems = [line for line in problems_of(params).splitlines() if "not a file" not in line]
    assert all("does not exist" in line for line in problems)


def test_the_committed_params_have_no_problems(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert check.problems() == []


def test_a_student_overrides_the_files_that_it_ships_as(params):
    params["export"] |= {"precision": "int8", "int8_training": {"epochs": 3}, "licence": "MIT"}
    params["students"]["small"]["export"] = {"int8_training": "none", "licence": None}
    write_params(Path(), params)
    assert load_export() == ExportParams(
        precision="int8", int8_training={"epochs": 3, "learning_rate_factor": 0.1}, licence="MIT"
    )
    assert load_export("small") == ExportParams(precision="int8", int8_training="none")


@pytest.mark.parametrize(
    ("export", "message"),
    [
        ({"precisions": "int8"}, "small.export.precisions` is unknown; did you mean `precision`?"),
        ({"precision": "int4"}, "small.export.precision` is 'int4'; expected 'float32' or 'int8'."),
        ({"int8_training": 2}, "int8_training`: it is 2; expected `none`, or a mapping of its"),
        ({"int8_training": {"epochs": 0}}, "int8_training.epochs` is 0; expected greater than"),
        (["int8"], "small.export` is ['int8']; expected a"),
    ],
)
def test_a_mistake_of_a_students_export_is_named_where_it_is_written(params, export, message):
    params["students"]["small"]["export"] = export
    assert message in problems_of(params)


def test_a_mistake_of_a_student_is_named_where_it_is_written(params):
    params["students"]["small"]["training"]["epoch"] = 3
    assert (
        "`params.yaml: students.small.training.epoch` is unknown; did you mean `epochs`? "
        "Known: backbone_learning_rate_factor, " in problems_of(params)
    )


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("views", "rand_augment", "yes", "it is 'yes'; expected `none`, or a mapping"),
        ("views", "rand_augment", {"magnitud": 3}, "rand_augment.magnitud` is unknown; did you"),
        ("teacher", "family", "resnet", "teacher.family`: there is no `pipeline/networks/resnet"),
        ("teacher", "checkpoint", None, "teacher.checkpoint` is empty"),
        ("training", "learning_rate", float("nan"), "learning_rate` is nan; expected"),
        ("training", "warmup_epochs", 2, "warmup_epochs is 2, but training ends after 2 epochs"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_was_expected(params, section, key, value, message):
    params[section][key] = value
    assert message in problems_of(params)


def test_all_problems_are_reported_at_once(params):
    del params["soft_targets"], params["views"]["mix"]
    params["training"]["epochs"] = 0
    params["students"]["small"]["network"] = {"name": "resnet8", "input_size": 2}
    lines = problems_of(params).splitlines()
    assert len(lines) == 4
    assert "`params.yaml: soft_targets` is missing; expected a section of that name." in lines
    assert "`params.yaml: views.mix` is missing." in lines
    assert any("`params.yaml: students.small.network.input_size` is 2" in line for line in lines)


def test_a_student_name_that_is_a_number_is_refused(params):
    params["students"][3] = params["students"].pop("small")
    assert "`params.yaml: students` has the name 3; expected" in problems_of(params)


def test_a_students_values_override_the_defaults_key_by_key(params):
    write_params(Path(), params)
    training = load_with_overrides(TrainingSection, "training", {"epochs": 7}, "small")
    assert training.epochs == 7
    assert training.learning_rate == PARAMS["training"]["learning_rate"]
    params["training"]["epochs"] = "x"
    write_params(Path(), params)
    with pytest.raises(UserError, match=r"`params.yaml: training.epochs` is 'x'"):
        load_with_overrides(TrainingSection, "training", {"seeds": 1}, "small")


def read(text: str) -> dict:
    Path("params.yaml").write_text(text, "utf-8")
    return read_params()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "expected a mapping of sections"),
        ("", "is empty"),
        (
            "b0: &b0 {x: 1}\n"
            + "".join(f"b{n}: &b{n} {{<<: [{f'*b{n - 1}, ' * 10}]}}\n" for n in range(1, 9)),
            "more than 100,000 values, counting what aliases repeat",  # before they are merged
        ),
    ],
    ids=["a list", "an empty file", "merges of merges"],
)
def test_a_file_that_is_no_mapping_or_has_no_end_is_refused(params, text, message):
    with pytest.raises(UserError, match=message):
        read(text)


def test_an_alias_and_a_merge_of_a_few_values_are_read(params):
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [*a, *a]"
    a = {"x": 1, "y": 2}
    assert read(text) == {"a": a, "b": {"x": 3, "y": 2}, "c": [a, a]}


@pytest.mark.parametrize("path", [ROOT / "params.yaml", ROOT / "dvc.yaml"], ids=lambda p: p.name)
def test_yaml_has_the_values_that_dvc_reads(path):
    assert read_yaml(path) == load_yaml(path)


def test_scalars_have_the_values_that_dvc_reads(params):
    text = "x:\n- 5e-4\n- 1e3\n- .inf\n- 1_000\n- 0o17\n- 0x1f\n- 1:30\n"
    text += "- yes\n- on\n- NO\n- ~\n- 017\n- 2024-01-02\n"
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
        ({"schedule": "step", "milestones": [9]}, "to 8 (the last epoch but one)"),
        (
            {"schedule": "step", "milestones": [2], "warmup_epochs": 3},
            "milestones are [2]; expected rising epochs from 3",
        ),
    ],
)
def test_contradictory_training_options_are_named_and_refused(params, values, message):
    for section in (params["training"], params["teacher"]["training"]):
        section |= {"epochs": 9}
    params["training"] |= values
    assert message in problems_of(params)
    params["teacher"]["training"] |= values
    del params["training"]
    assert message in problems_of(params)


def test_null_in_a_student_removes_a_default(params):
    params["training"] |= {"momentum": 0.8, "gradient_clip_norm": 1.0}
    overrides = {"optimizer": "adamw", "momentum": None, "gradient_clip_norm": None}
    params["students"]["small"]["training"] = overrides
    assert problems_of(params) == ""
    training = load_with_overrides(TrainingSection, "training", overrides, "small")
    assert (training.optimizer, training.gradient_clip_norm) == ("adamw", None)
    params["students"]["small"]["training"] = {"epochs": None}
    assert problems_of(params) == "`params.yaml: students.small.training.epochs` is missing."


def test_a_student_of_another_method_does_not_inherit_which_views_it_sees():
    def of(own: dict | None) -> str:
        section = {"method": "kd", "paired_views": "weak_to_strong"}
        return paired_views(
            {"distillation": section, "students": {"s": {"distillation": own}}}, "s"
        )

    assert of(None) == of({}) == of({"method": "kd"}) == "weak_to_strong"
    assert of({"method": "dkd"}) == of({"paired_views": None}) == "both"
