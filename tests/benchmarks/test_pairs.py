"""Each teacher trains each student end to end: ResNet and Inception teach MobileNet and SqueezeNet,
on 32-pixel images and on photographs of many sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import PARAMS, opened, run_stage, write_images, write_params
from PIL import Image

TEACHERS = ("resnet50", "resnet18", "inception_v3")
STUDENTS = ("mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1")
SIDE = 96  # of views of photographs; Inception takes 75 and more


def write_photographs(root: Path, per_class: int = 12) -> None:
    """JPEG of many sizes and both orientations, a few of them greyscale."""
    for label, name in enumerate(("n01440764", "n01443537", "n01484850")):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for index in range(per_class):
            rng = np.random.default_rng([label, index])
            small = rng.integers(0, 120, (6, 7, 3), dtype=np.uint8)
            small[..., label] += 120
            size = (120 + 23 * index, 260 - 11 * index)
            image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
            (image.convert("L") if index % 6 == 5 else image).save(folder / f"{index}.JPEG")


def params(teacher: str, kind: str) -> dict:
    photographs = kind == "photographs"
    side = SIDE if photographs else 32
    policy = "random_resized_crop" if photographs else "crop_flip"
    input_size = {"inception_v3": SIDE}.get(teacher, side)
    steps = {"epochs": 1, "batch_size": 12, "learning_rate": 0.01}
    dataset = {"image_size": side} | ({"storage": "encoded"} if photographs else {})
    return PARAMS | {
        "dataset": PARAMS["dataset"] | dataset,
        "views": PARAMS["views"] | {"policy": policy, "count": 1, "image_size": side},
        "teacher": PARAMS["teacher"]
        | {
            "family": "torchvision",
            "network": {"name": teacher, "input_size": input_size},
            # Batch norm's running statistics start far from Inception's activations: after only a
            # few steps its logits are beyond float16.
            "training": steps
            | {"policy": policy, "seed": 1, "epochs": 10 if teacher == "inception_v3" else 1},
        },
        "training": PARAMS["training"] | steps,
        "students": {
            name: {
                "family": "torchvision",
                "network": {"name": name, "input_size": max(side, 64)},
                "training": {},
                "distillation": {},
            }
            for name in STUDENTS
        },
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["32 pixels", "photographs"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_each_teacher_teaches_each_student_a_few_steps(tmp_path, monkeypatch, teacher, kind):
    monkeypatch.chdir(tmp_path)
    if kind == "photographs":
        write_photographs(tmp_path / "images")
    else:
        write_images(tmp_path / "images", per_class=12, size=32)
    write_params(tmp_path, params(teacher, kind))
    for stage in ("prepare", "teacher", "soft_targets"):
        run_stage(stage)
    logits = opened().gather(0, np.arange(6)).logits.astype(np.float32)
    assert np.isfinite(logits).all()
    assert logits.std(0).min() > 0  # the logits depend on the image
    for name in STUDENTS:
        run_stage("student", name)
        run_stage("baseline", name)
    for models in ("--teacher", *STUDENTS):
        run_stage("export", models)
        run_stage("robustness", models)
    run_stage("speed")
    run_stage("compare")
    compared = json.loads(Path("metrics/comparison.json").read_text("utf-8"))
    assert set(compared["students"]) == set(STUDENTS)
    for name in STUDENTS:
        history = Path(f"metrics/history/students/{name}.csv").read_text("utf-8").splitlines()
        assert len(history) == 2
        assert float(history[1].split(",")[2]) > 0  # the training loss
