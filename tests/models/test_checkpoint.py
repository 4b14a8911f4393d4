"""Networks on disk."""

import json
from pathlib import Path

import pytest
import torch
from conftest import PARAMS, run_stage, write_params
from safetensors.torch import save_file
from torch import nn

from pipeline.models import checkpoint
from pipeline.models.evaluation import classification_metrics
from pipeline.models.spec import InputSpec, ModelSpec, build
from pipeline.networks import cifar_resnet
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import TEACHER
from pipeline.teacher import foreign_teacher

SPEC = InputSpec(3, 16, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])


def describe(**changed: object) -> ModelSpec:
    values = {
        "family": "cifar_resnet",
        "network": "resnet8",
        "options": {},
        "class_names": ["a", "b", "c"],
        "input": SPEC,
    }
    return ModelSpec(**(values | changed))


def test_a_saved_network_is_rebuilt_with_its_logits(tmp_path):
    torch.manual_seed(0)
    network = build(describe())
    checkpoint.save(tmp_path, network, describe())
    rebuilt, description = checkpoint.load(tmp_path, produced_by="-")
    views = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert description == describe()
    network.eval()
    rebuilt.eval()
    assert torch.equal(network(SPEC.apply(views)), rebuilt(description.input.apply(views)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format_version": 2}, "format_version` is 2; expected 1"),
        ({"input": {"mean": [0.5]}}, "input`: mean and std have not one value for each channel"),
        ({"input": {"std": [0.2, 0.0, 0.2]}}, "input.std.1` is 0.0; expected greater than 0"),
    ],
)
def test_a_changed_description_is_refused_by_its_key(tmp_path, changed, message):
    checkpoint.save(tmp_path, build(describe()), describe())
    path = tmp_path / "network.json"
    content = json.loads(path.read_text("utf-8"))
    if "input" in changed:
        changed = {"input": content["input"] | changed["input"]}
    path.write_text(json.dumps(content | changed), "utf-8")
    with pytest.raises(UserError, match=f"{path}: {message}"):
        checkpoint.fingerprint(tmp_path, produced_by="-")


def test_the_fingerprint_changes_with_weights_and_input(tmp_path):
    prints = set()
    for index, description in enumerate(
        (describe(), describe(input=InputSpec(3, 16, [0] * 3, [1] * 3)))
    ):
        for seed in (0, 1):
            torch.manual_seed(seed)
            folder = tmp_path / f"{index}{seed}"
            folder.mkdir()
            checkpoint.save(folder, build(description), description)
            prints.add(checkpoint.fingerprint(folder, produced_by="-"))
    assert len(prints) == 4


def test_the_input_is_normalised_and_resized_per_network():
    views = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (SPEC.mean, SPEC.std))
    torch.testing.assert_close(SPEC.apply(views), (views / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    larger = InputSpec(3, 24, SPEC.mean, SPEC.std)
    assert larger.apply(views).shape == (2, 3, 24, 24)
    blank = torch.full((1, 3, 16, 16), 51, dtype=torch.uint8)
    expected = ((0.2 - mean) / std).expand(1, 3, 24, 24)
    torch.testing.assert_close(larger.apply(blank), expected, rtol=1e-5, atol=1e-5)


OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}


def loaded(content: object) -> nn.Module:
    """A network with the weights of a file of this content."""
    torch.save(content, "weights.pth")
    network, _ = foreign_teacher.load_foreign(describe(), Path("weights.pth"))
    return network


def state_of(seed: int, prefix: str = "") -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    network = cifar_resnet.build("resnet8", 3, 3)
    return {f"{prefix}{key}": value for key, value in network.state_dict().items()}


def has_weights(network: nn.Module, seed: int) -> bool:
    expected = state_of(seed)
    return all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "_orig_mod.module.", "model."])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3, "optimizer": OPTIMIZER},
        lambda s: {"model": {"state_dict": s, "other": {"x": torch.ones(1)}}, "copy": s},
        lambda s: {"run": {"classifier": s}, "optimizer": OPTIMIZER},  # the only one there
    ],
)
def test_foreign_checkpoints_are_unwrapped_and_lose_their_prefixes(folder, wrap, prefix):
    assert has_weights(loaded(wrap(state_of(0, prefix))), 0)


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema", "ema", "ema_state_dict"])
def test_averaged_weights_are_preferred(folder, capsys, name):
    averaged = {"n_averaged": torch.tensor(7), **state_of(1, "module.")}
    for content in ({"state_dict": state_of(0), name: averaged}, {name: averaged, "model": {}}):
        assert has_weights(loaded(content), 1)
        output = capsys.readouterr().out.splitlines()
        assert output[0] == f"  weights.pth: the weights under `{name}`"
        assert f"`{name}.n_averaged`" in output[1]


@pytest.mark.parametrize("prefix", ["ema_model.", "model_ema.module.", "ema."])
def test_averaged_weights_within_one_state_dict_are_preferred_by_their_prefix(folder, prefix):
    for own in ("", "model."):
        mixed = {**state_of(0, own), **state_of(1, prefix), "n_averaged": torch.tensor(7)}
        assert has_weights(loaded({"state_dict": mixed}), 1)


def test_several_sets_of_weights_of_unknown_meaning_are_refused_by_their_names(folder):
    content = {"nets": {"other": state_of(0), "model": state_of(1)}, "optimizer": OPTIMIZER}
    message = (
        "`weights.pth` holds 2 sets of weights that fit the network, `nets.other`, `nets.model`; "
        "expected one. .* `teacher.checkpoint_key: nets.other`"
    )
    with pytest.raises(UserError, match=message):
        loaded(content)


def test_foreign_safetensors_are_read(tmp_path):
    save_file(state_of(0), tmp_path / "weights.safetensors")
    target, _ = foreign_teacher.load_foreign(describe(), tmp_path / "weights.safetensors")
    assert has_weights(target, 0)


def test_a_checkpoint_of_another_network_is_refused_with_the_keys_that_do_not_fit(folder):
    state = cifar_resnet.build("resnet8", 10, 3).state_dict()
    state["conv_1.weight"] = state.pop("conv.weight")
    state |= {f"more.{number}": torch.zeros(1) for number in range(20)}
    with pytest.raises(UserError) as refusal:
        loaded(state)
    lines = [line.strip() for line in str(refusal.value).splitlines()]
    assert "missing `conv.weight` [16, 3, 3, 3]; did you mean `conv_1.weight`?" in lines
    assert sum(line.startswith("unexpected `") for line in lines) == 10
    assert "`fc.weight` is [10, 64]; expected [3, 64]" in lines
    assert lines[-2] == "..."


class Payload:
    """Pickled as a call that leaves a file behind."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_pickled_code_is_ignored_unexecuted(folder):
    with pytest.raises(UserError, match=r"is not a state dict; .* 1 entry: `state_dict` \("):
        loaded({"state_dict": Payload()})
    assert has_weights(loaded({"state_dict": state_of(0), "args": Payload()}), 0)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("network", "channels"),
    [("resnet18", 1), ("squeezenet1_1", 1), ("googlenet", 3)],
)
def test_torchvisions_networks_take_any_number_of_channels_and_classes(network, channels):
    spec = InputSpec(channels, 64, [0.5] * channels, [0.2] * channels)
    built = build(describe(family="torchvision", network=network, input=spec))
    views = torch.randint(0, 256, (2, channels, 64, 64), dtype=torch.uint8)
    for mode in (True, False):  # an auxiliary head would return more than logits in training
        assert built.train(mode)(spec.apply(views)).shape == (2, 3)


def test_options_reach_torchvisions_networks_and_unknown_options_and_names_are_refused():
    half = build(
        describe(family="torchvision", network="mobilenet_v2", options={"width_mult": 0.5})
    )
    assert sum(p.numel() for p in half.parameters()) < 1e6
    with pytest.raises(UserError, match="does not take the options"):
        build(describe(options={"width": 2}))
    with pytest.raises(UserError, match="has no network `mobilenet_v9`; did you mean `mobilenet_v"):
        build(describe(family="torchvision", network="mobilenet_v9"))


def test_a_network_that_cannot_take_its_input_is_refused(monkeypatch):
    monkeypatch.setattr(
        cifar_resnet,
        "build",
        lambda *a: nn.Sequential(nn.Conv2d(3, 3, 33), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    with pytest.raises(
        UserError, match=r"cannot take 3 x 16 x 16 pixels .* Set another `input_size`\."
    ):
        build(describe())


def test_a_network_that_was_pretrained_is_refused_with_the_size_that_it_was_pretrained_at():
    for network in ("alexnet", "vit_b_32"):  # RuntimeError, AssertionError
        with pytest.raises(UserError, match="Set `input_size: 224`, as it was pretrained"):
            build(describe(family="torchvision", network=network))


def test_a_network_that_does_not_return_logits_is_refused(monkeypatch):
    monkeypatch.setattr(cifar_resnet, "build", lambda *a: nn.Flatten())
    with pytest.raises(
        UserError, match=r"returns \[1, 768\] for one image; expected logits \[1, 3\]"
    ):
        build(describe())


def test_metrics_agree_with_torchmetrics():
    # It loads for seconds.
    from torchmetrics.functional.classification import multiclass_accuracy  # noqa: PLC0415

    torch.manual_seed(0)
    logits, labels = torch.randn(500, 20), torch.randint(0, 20, (500,))
    metrics = classification_metrics(logits, labels, "test")
    for name, k in (("test_accuracy", 1), ("test_top5_accuracy", 5)):
        expected = multiclass_accuracy(logits, labels, 20, average="micro", top_k=k).item()
        assert metrics[name] == pytest.approx(expected, abs=1e-6)
    expected = -torch.log_softmax(logits, 1)[torch.arange(500), labels].mean().item()
    assert metrics["test_nll"] == pytest.approx(expected, rel=1e-6)
    few = classification_metrics(logits[:, :3], labels % 3, "test")
    assert few["test_top5_accuracy"] == 1  # of fewer than five classes it is everything


def test_a_teacher_from_a_checkpoint_has_its_weights_and_is_not_trained(project):
    source, _ = checkpoint.load(TEACHER.model, produced_by="-")
    with torch.no_grad():
        source.fc.weight.mul_(2)
        source.fc.bias.mul_(2)
    torch.save(source.state_dict(), "mine.pth")
    teacher = PARAMS["teacher"] | {"weights": "checkpoint", "checkpoint": "mine.pth"}
    write_params(project, PARAMS | {"teacher": teacher})
    run_stage("teacher")
    taught, _ = checkpoint.load(TEACHER.model, produced_by="-")
    assert torch.equal(taught.fc.weight, source.fc.weight)
