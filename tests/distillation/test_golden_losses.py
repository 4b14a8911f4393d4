"""The losses are those of their authors' code, to the tenth digit.

Reads the folder that GOLDEN_DIR names (default ../shared/golden): meta.json lists cases, which are
files of logits, labels, and what the original code made of them, in float64 and in float32.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from import_closure import ROOT
from method_loss import method_loss
from torch import Tensor

from pipeline.distillation import losses
from pipeline.distillation.objective import paired_loss
from pipeline.distillation.params import METHODS
from pipeline.students.label_loss import label_loss
from pipeline.students.loop import TrainingBatch

FOLDER = Path(os.environ.get("GOLDEN_DIR", ROOT / "../shared/golden"))
META = json.loads((FOLDER / "meta.json").read_text("utf-8")) if FOLDER.is_dir() else None
needs_golden = pytest.mark.skipif(META is None, reason=f"no golden losses in {FOLDER}")

#: Entries that are no method of ours, by the file that they come from, and why.
LEFT_OUT = {
    "knowledge_distiller.py": "weighted soft labels: not offered",
    "mmcls/models/dis_losses/wsld.py": "weighted soft labels: not offered",
    "my_loss_function.py": "teacher-free: nothing of it comes from a cache",
    "distiller_zoo/KD.py + models/temp_global.py + helper/loops.py": "a learned temperature",
    "Distiller/SKD.py": "its direction term: not offered",
    "FKD/utils_FKD.py": "soft cross-entropy to float32 targets that do not sum to 1 in float64",
}
#: Likewise, where other entries of the file are ours.
LEFT_OUT_FUNCTIONS = {"DISTLoss.forward": "torchdistill's variant of `dist`: it clamps the norms"}


@dataclass(frozen=True)
class Rows:
    """One case's arrays, in one precision; the students' logits ask for gradients."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    student_strong: Tensor | None = None
    teacher_strong: Tensor | None = None


Constants = Mapping[str, Any]


def by_method(method: str, **renamed: str) -> Callable[[Rows, Constants], Tensor]:
    """The loss function, its arguments by the names that the original gives them."""

    def loss(rows: Rows, given: Constants) -> Tensor:
        arguments = {ours: given[theirs] for ours, theirs in renamed.items()}
        labels = {"labels": rows.labels} if METHODS[method].needs_labels else {}
        if given.get("logit_stand"):
            arguments["standardize"] = True
        return getattr(losses, method)(rows.student, rows.teacher, **labels, **arguments)

    return loss


def by_parameters(method: str, **renamed: str) -> Callable[[Rows, Constants], Tensor]:
    """A whole objective, as a student's parameters say it."""

    def loss(rows: Rows, given: Constants) -> Tensor:
        said = {ours: given[theirs] for ours, theirs in renamed.items()}
        if given.get("logit_stand"):
            said["standardize"] = True
        params = METHODS[method](method=method, **said)
        soft = method_loss(params)(
            rows.student, rows.teacher, rows.labels, None, given.get("epoch", 1)
        )
        return soft + params.hard_label_weight * label_loss(rows.student, rows.labels)

    return loss


def soft_cross_entropy_halved(rows: Rows, given: Constants) -> Tensor:
    temperature = given["temp"]
    loss = losses.soft_cross_entropy(rows.student, rows.teacher, temperature=temperature)
    return given["alpha"] * loss


def torchdistill_kd(rows: Rows, given: Constants) -> Tensor:
    soft = losses.kd(rows.student, rows.teacher, temperature=given["temperature"])
    hard = label_loss(rows.student, rows.labels)
    return given["alpha"] * hard + (1 - given["alpha"]) * soft


def torchdistill_standardized(rows: Rows, given: Constants) -> Tensor:
    soft = losses.kd(rows.student, rows.teacher, temperature=given["temperature"], standardize=True)
    return given["alpha"] * label_loss(rows.student, rows.labels) + given["beta"] * soft


def released_mlkd(rows: Rows, given: Constants) -> Tensor:
    """The whole objective of a weak and a strong view, as a student's parameters say it."""
    params = METHODS["mlkd"](
        method="mlkd",
        temperatures=[float(each) for each in given["temps"]],
        hard_label_weight=given["ce_weight"],
        soft_label_weight=given["kd_weight"],
        standardize=bool(given.get("logit_stand")),
    )
    teacher = rows.teacher.numpy(), rows.teacher_strong.numpy()
    device = torch.device("cpu")
    loss = paired_loss(params, lambda view, samples: (teacher[view], None), device)
    samples = np.arange(len(rows.labels))
    batch = TrainingBatch(1, 0, samples, rows.labels)
    return loss(torch.stack([rows.student, rows.student_strong]), batch)


def of_terms(term: Callable[..., Tensor]) -> Callable[[Rows, Constants], Tensor]:
    return lambda rows, given: term(rows.student, rows.teacher, temperature=given["temperature"])


def not_centred_mse(rows: Rows, given: Constants) -> Tensor:
    """Ours is less each row's mean."""
    means = (rows.student - rows.teacher).mean(1).square().mean()
    return losses.logit_mse(rows.student, rows.teacher) + means


DKD = {"alpha": "alpha", "beta": "beta", "temperature": "temperature"}
WEIGHTS = {"hard_label_weight": "ce_weight", "soft_label_weight": "kd_weight"}
#: (end of the repository's name, function) -> ours.
OURS: dict[tuple[str, str], Callable[[Rows, Constants], Tensor]] = {
    ("mdistiller", "kd_loss"): by_method("kd", temperature="temperature"),
    ("RepDistiller", "DistillKL.forward"): by_method("kd", temperature="T"),
    ("cls_KD", "KDLoss.forward [1]"): soft_cross_entropy_halved,
    ("mdistiller", "dkd_loss"): by_method("dkd", **DKD),
    ("image_classification_sota", "DIST.forward"): by_method(
        "dist", beta="beta", gamma="gamma", temperature="tau"
    ),
    ("logit-standardization-KD", "kd_loss"): by_method("kd", temperature="temperature"),
    ("logit-standardization-KD", "dkd_loss"): by_method("dkd", **DKD),
    ("cls_KD", "NKDLoss.forward"): by_method("nkd", gamma="gamma", temperature="temp"),
    ("Multi-Level-Logit-Distillation", "kd_loss"): by_method("kd", temperature="temperature"),
    ("Multi-Level-Logit-Distillation", "cc_loss"): of_terms(losses.class_correlation),
    ("Multi-Level-Logit-Distillation", "bc_loss"): of_terms(losses.batch_correlation),
    ("torch", "mse_loss(reduction=mean)"): not_centred_mse,
    ("TTM", "TTM.forward"): by_method("ttm", gamma="l"),
    ("TTM", "WTTM.forward"): by_method("wttm", gamma="l"),
    ("RLD", "rld_loss"): by_method("rld", **DKD, alpha_temperature="alpha_temperature"),
    ("torchdistill", "KDLoss.forward"): torchdistill_kd,
    ("torchdistill", "LogitStdKDLoss.forward"): torchdistill_standardized,
    ("mdistiller", "KD.forward_train"): by_parameters("kd", temperature="temperature", **WEIGHTS),
    ("mdistiller", "DKD.forward_train"): by_parameters(
        "dkd", alpha="alpha", beta="beta", temperature="T", warmup_epochs="warmup",
        hard_label_weight="ce_weight",
    ),
    ("logit-standardization-KD", "KD.forward_train"): by_parameters(
        "kd", temperature="temperature", **WEIGHTS
    ),
    ("Multi-Level-Logit-Distillation", "KD_ours.forward_train"): released_mlkd,
    ("logit-standardization-KD", "MLKD.forward_train"): released_mlkd,
}  # fmt: skip


def ours(name: str) -> Callable[[Rows, Constants], Tensor] | None:
    """Our counterpart of an entry; None where it is left out.

    Raises:
        KeyError: an entry that is neither ours nor left out for a reason.
    """
    method = META["methods"][name]
    if method["path"] in LEFT_OUT or method["function"] in LEFT_OUT_FUNCTIONS:
        return None
    return OURS[method["repo"].split("/")[-1], method["function"]]


def entries() -> list[tuple[str, str]]:
    if META is None:
        return []
    return [
        (case, name)
        for case, content in META["cases"].items()
        for name in content["results"]
        if ours(name) is not None
    ]


def rows_of(case: str, dtype: torch.dtype) -> tuple[Rows, Mapping[str, np.ndarray]]:
    file = np.load(FOLDER / META["cases"][case]["file"])

    def tensor(key: str, gradient: bool) -> Tensor | None:
        if key not in file:
            return None
        return torch.from_numpy(file[key]).to(dtype).requires_grad_(gradient)

    return (
        Rows(
            tensor("student", True),
            tensor("teacher", False),
            torch.from_numpy(file["target"]),
            tensor("student_strong", True),
            tensor("teacher_strong", False),
        ),
        file,
    )


def computed(name: str, rows: Rows) -> tuple[float, dict[str, np.ndarray]]:
    loss = ours(name)(rows, META["methods"][name]["hyperparameters"])
    loss.backward()
    gradients = {"grad": rows.student.grad}
    if rows.student_strong is not None:
        gradients["grad_strong"] = rows.student_strong.grad
    return loss.item(), {key: g.double().numpy() for key, g in gradients.items() if g is not None}


@needs_golden
@pytest.mark.parametrize(("case", "name"), entries())
def test_loss_and_gradient_are_those_of_the_authors_code(case, name):
    found = META["cases"][case]["results"][name]
    exact, file = rows_of(case, torch.float64)
    loss, gradients = computed(name, exact)
    expected_loss = found["f64"]["loss"]
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    expected = {k: file[f"{name}/f64/{k}"] for k in gradients if f"{name}/f64/{k}" in file}
    for key, golden in expected.items():
        assert np.abs(gradients[key] - golden).max() <= 1e-10 * np.abs(golden).max()
    if not expected:
        norm = np.linalg.norm(gradients["grad"])
        assert norm == pytest.approx(found["f64"]["grad_l2"], rel=1e-10)

    # In float32, the original's figures where they are good, and always those of float64.
    loss_32, gradients_32 = computed(name, rows_of(case, torch.float32)[0])
    assert loss_32 == pytest.approx(expected_loss, rel=1e-5)
    original = found["f32_vs_f64"]
    if original["loss_rel"] <= 1e-5:  # false for NaN
        assert loss_32 == pytest.approx(found["f32"]["loss"], rel=1e-5)
    rounding = original.get("grad_maxabs_rel")
    for key, golden in expected.items():
        assert np.isfinite(gradients_32[key]).all()
        if rounding is None or not rounding <= 2e-5:  # magnified rounding: no two agree there
            continue
        assert np.abs(gradients_32[key] - golden).max() <= 2e-5 * np.abs(golden).max()
        if f"{name}/f32/{key}" in file:
            theirs = file[f"{name}/f32/{key}"].astype(np.float64)
            assert np.abs(gradients_32[key] - theirs).max() <= 2e-5 * np.abs(theirs).max()


@needs_golden
def test_every_entry_is_compared_or_left_out_for_a_stated_reason():
    compared = {name for _, name in entries()}
    methods = {name for content in META["cases"].values() for name in content["results"]}
    for name in methods - compared:
        method = META["methods"][name]
        assert method["path"] in LEFT_OUT or method["function"] in LEFT_OUT_FUNCTIONS
    assert compared
