"""Several processes train as one does."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from conftest import change_params, run_stage, write_params
from import_closure import ROOT
from ranks import results_of_two
from safetensors.numpy import load_file
from stage_process import TORCHRUNS_POPEN, fork, fork_command, start
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.compute.distributed import ProcessGroup
from pipeline.runtime.files import sha256_of_file
from pipeline.training.data_parallel import (
    SynchronisedBatchNorm,
    local_rows,
    synchronise_batch_norm,
)

STAGES = ["student:small", "baseline:small", "teacher"]
MODELS = ["students/small", "baselines/small", "teacher"]
RANKS = 3


def run_in_float64(ranks: int) -> None:
    """STAGES in the current folder, in so many processes."""
    arguments = ["--ranks", str(ranks)] if ranks > 1 else []
    process = fork(ROOT / "tests/float64_stages.py", *arguments, "--relate-rows", *STAGES)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stdout + stderr
    assert ranks == 1 or not stderr  # rank 0 speaks for all


def start_from_weights(params: dict, hub: Path, *, freeze_batch_norm: bool) -> None:
    """Let the student and its baseline start from a trained network, with a new last layer, which
    an epoch trains alone; if batch norm is frozen, the teacher from published weights, too."""
    fine_tuning = {
        "epochs": 2,
        "freeze_epochs": 1,
        "freeze_batch_norm": freeze_batch_norm,
        "backbone_learning_rate_factor": 0.3,
    }
    params["training"] |= fine_tuning
    shutil.copytree("models/baselines/small", "start")
    digest = sha256_of_file(Path("start/network.json"))
    weights = {"path": "start", "sha256": digest, "head": "new"}
    params["students"]["small"]["network"] = {"name": "resnet8", "weights": weights}
    if freeze_batch_norm:
        name = "resnet18"
        folder = hub / "hub/checkpoints"
        folder.mkdir(parents=True)
        file = Path(torchvision.models.get_model_weights(name).DEFAULT.url).name
        torch.save(torchvision.models.get_model(name).state_dict(), folder / file)
        network = {"name": name, "input_size": 32}
        params["teacher"] |= {"family": "torchvision", "network": network, "weights": "pretrained"}
        params["teacher"]["training"] |= fine_tuning


@pytest.mark.parametrize(
    "case",
    [
        "fine-tuned",
        pytest.param("fine-tuned, batch norm frozen", marks=pytest.mark.slow),
        pytest.param("unlabelled", marks=pytest.mark.slow),
        pytest.param("pairs of views", marks=pytest.mark.slow),
    ],
)
def test_several_processes_end_with_the_weights_and_measures_of_one(
    project, case, tmp_path, monkeypatch
):
    if case == "unlabelled":  # a baseline's batches then join two passes: of 36 images, of 17 each
        shutil.copytree("images/train", "images/unlabeled")
        for stage in ("prepare", "teacher", "soft_targets"):
            run_stage(stage)
    if case == "pairs of views":
        strong = {"operations": 2, "magnitude": 10}
        change_params("views", rand_augment={"weak": "none", "strong": strong})
        run_stage("soft_targets")
    # 36 training images in batches of 17: shares of 6, 6, 5 rows, and of 1, 1, none.
    training = {"batch_size": 17, "warmup_epochs": 1, "ema_decay": 0.5, "gradient_clip_norm": 1.0}
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    params["training"] |= training
    params["teacher"]["training"] |= training | {"epochs": 2}
    if case.startswith("fine-tuned"):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
        start_from_weights(params, tmp_path / "hub", freeze_batch_norm="frozen" in case)
    write_params(Path(), params)
    teacher, results = Path("models/teacher"), []
    shutil.copytree(teacher, "teacher")  # whose soft targets the student has
    for ranks in (1, RANKS):
        run_in_float64(ranks)
        results.append(
            {
                model: (
                    load_file(f"models/{model}/weights.safetensors"),
                    load_file(f"predictions/{model}.safetensors"),
                    yaml.safe_load(Path(f"metrics/{model}.json").read_text("utf-8")),
                )
                for model in MODELS
            }
        )
        shutil.rmtree(teacher)
        shutil.copytree("teacher", teacher)
    for model in MODELS:
        (weights, predictions, metrics), (others, other_predictions, other_metrics) = (
            result[model] for result in results
        )
        assert list(weights) == list(others)
        for name, values in weights.items():
            np.testing.assert_allclose(others[name], values, rtol=0, atol=1e-6, err_msg=name)
        for split, values in predictions.items():
            np.testing.assert_allclose(other_predictions[split], values, rtol=0, atol=1e-5)
        assert other_metrics == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("small", r"error: the training loss is nan at step \d+ of \d+ in epoch .*"),
        ("smal", "error: `params.yaml: students` has no `smal`; did you mean `small`?.*"),
    ],
)
def test_a_divergence_and_a_mistake_are_told_by_one_process(project, monkeypatch, name, message):
    change_params("training", learning_rate=1e30)
    monkeypatch.setattr(TORCHRUNS_POPEN, fork_command)
    process = start(2, ROOT, "student", name)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert re.fullmatch(message, stderr.strip())


def test_shares_are_a_batch_in_its_order():
    for count in (1, 2, 16, 17):
        shares = [local_rows(np.arange(count), ProcessGroup(rank, 3)) for rank in range(3)]
        assert np.array_equal(np.concatenate(shares), np.arange(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.fixture
def alone_in_a_group(tmp_path):
    """A process group of this process."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("shape", "options"),
    [((6, 5), {}), ((6, 5, 4), {"affine": False}), ((6, 5, 3, 2), {"momentum": None})],
)
def test_synchronised_batch_norm_of_one_process_is_that_of_torch(alone_in_a_group, shape, options):
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    torch.manual_seed(0)
    theirs, ours = (nn.Sequential(kind(5, **options)).double() for _ in range(2))
    names = list(ours.state_dict())
    synchronise_batch_norm(ours)
    assert type(ours[0]) is SynchronisedBatchNorm
    assert list(ours.state_dict()) == names
    for _ in range(3):
        features = 100 + 3 * torch.randn(shape, dtype=torch.float64)
        inputs = [features.clone().requires_grad_() for _ in range(2)]
        outputs = [norm(x) for norm, x in zip((theirs, ours), inputs, strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0])
        for output in outputs:
            (output * torch.arange(5).view(-1, *[1] * (len(shape) - 2))).square().sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-5, atol=1e-7)
    for (name, a), b in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, msg=name)
    for norm in (theirs, ours):
        norm.eval()
    torch.testing.assert_close(ours(features), theirs(features))


def test_synchronised_batch_norm_keeps_a_small_variance_beside_a_large_mean(alone_in_a_group):
    norm = SynchronisedBatchNorm(1, eps=0)
    features = 1000 + torch.tensor([[-0.25], [0.25]]) * torch.ones(2, 64)[:, :1]
    torch.testing.assert_close(norm(features), torch.tensor([[-1.0], [1.0]]))
    half = norm(features.bfloat16() - 1000)
    assert half.dtype == torch.bfloat16


class _OnTheDevice(TorchDispatchMode):
    """Refuses what on a GPU would wait for it, or would copy from the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero"), name
        assert name != "aten::index" or all(i.dtype != torch.bool for i in args[1] if i is not None)
        return func(*args, **(kwargs or {}))


def test_synchronised_batch_norm_never_waits_for_its_device(alone_in_a_group):
    norm, features = SynchronisedBatchNorm(5), torch.randn(6, 5, 3, 3)
    with _OnTheDevice():
        norm(features.requires_grad_()).sum().backward()


def test_a_rank_without_rows_shares_statistics_in_float32_under_autocast():
    torch.manual_seed(0)
    features = (50 + torch.randn(4, 3, 2, 2)).bfloat16()
    expected = nn.BatchNorm2d(3)
    with torch.autocast("cpu", enabled=False):
        normalised = expected(features.float()).bfloat16()

    def run(group: ProcessGroup) -> list[object]:
        norm = SynchronisedBatchNorm(3)
        rows = features[4 * group.rank :].requires_grad_()  # all, and none
        with torch.autocast("cpu", torch.bfloat16):
            output = norm(rows)
        output.float().square().sum().backward()
        return [output.dtype, output.float().tolist(), rows.grad.isfinite().all().item()] + [
            buffer.tolist() for buffer in (norm.running_mean, norm.running_var)
        ]

    for rank, (dtype, output, finite, mean, variance) in enumerate(results_of_two(run)):
        assert dtype == torch.bfloat16
        assert finite
        torch.testing.assert_close(torch.tensor(mean), expected.running_mean)
        torch.testing.assert_close(torch.tensor(variance), expected.running_var)
        assert len(output) == (0 if rank else 4)
        if rank == 0:
            torch.testing.assert_close(torch.tensor(output), normalised.float())
