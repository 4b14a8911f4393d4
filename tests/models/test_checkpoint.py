"""Networks on disk."""

import json
from pathlib import Path

import pytest
import torch
from conftest import PARAMS, run_stage, write_params
from safetensors.torch import save_file
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from pipeline.models import checkpoint
from pipeline.models.evaluation import classification_metrics, count_parameters_and_macs
from pipeline.models.spec import InputSpec, ModelSpec, build
from pipeline.networks import cifar_resnet
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import TEACHER
from pipeline.teacher import foreign_checkpoint

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
        ({"famly": "timm"}, "famly` is unknown; did you mean `family`"),
        ({"input": {"size": 0}}, "input.size` is 0; expected greater than or equal to 1"),
        ({"input": {"mean": [0.5]}}, "input`: mean and std have not one value for each channel"),
        ({"input": {"std": [0.2, 0.0, 0.2]}}, "input.std.1` is 0.0; expected greater than 0"),
        ({"input": {"siz": 8}}, "input.siz` is unknown; did you mean `size`"),
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
    target = cifar_resnet.build("resnet8", 3, 3)
    foreign_checkpoint.load_foreign_weights(target, Path("weights.pth"))
    return target


def state_of(seed: int, prefix: str = "") -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    network = cifar_resnet.build("resnet8", 3, 3)
    return {f"{prefix}{key}": value for key, value in network.state_dict().items()}


def has_weights(network: nn.Module, seed: int) -> bool:
    expected = state_of(seed)
    return all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3, "optimizer": OPTIMIZER},
        lambda s: {"model": s},
        lambda s: {"model": {"state_dict": s}, "args": {"lr": 0.1}},
        lambda s: {"net": s, "acc": 93.1},
        lambda s: {"run": {"classifier": s}, "optimizer": OPTIMIZER},  # the only one there
    ],
)
def test_foreign_checkpoints_are_unwrapped(tmp_path, monkeypatch, wrap):
    monkeypatch.chdir(tmp_path)
    assert has_weights(loaded(wrap(state_of(0, "module."))), 0)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.module.", "model."])
def test_the_names_of_a_foreign_checkpoint_may_have_a_prefix(tmp_path, monkeypatch, prefix):
    monkeypatch.chdir(tmp_path)
    assert has_weights(loaded({"model": state_of(0, prefix)}), 0)


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema", "ema", "ema_state_dict"])
def test_averaged_weights_are_preferred(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    averaged = {"n_averaged": torch.tensor(7), **state_of(1, "module.")}
    for content in ({"state_dict": state_of(0), name: averaged}, {name: averaged, "model": {}}):
        assert has_weights(loaded(content), 1)
        assert capsys.readouterr().out == f"  weights.pth: the weights under `{name}`\n"


@pytest.mark.parametrize("prefix", ["ema_model.", "model_ema.module.", "ema."])
def test_averaged_weights_within_one_state_dict_are_preferred_by_their_prefix(
    tmp_path, monkeypatch, prefix
):
    monkeypatch.chdir(tmp_path)
    for own in ("", "model."):
        mixed = {**state_of(0, own), **state_of(1, prefix), "n_averaged": torch.tensor(7)}
        assert has_weights(loaded({"state_dict": mixed}), 1)


def test_several_state_dicts_without_a_usual_name_are_refused_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {"nets": {"student": state_of(0), "teacher": state_of(1)}, "optimizer": OPTIMIZER}
    with pytest.raises(UserError) as refusal:
        loaded(content)
    assert "holds 2 state dicts, `nets.student`, `nets.teacher`; expected one, or one" in str(
        refusal.value
    )


@pytest.mark.parametrize("content", [{}, [1], {"state_dict": {}}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="`weights.pth` is not a state dict; expected a mapping"):
        loaded(content)


def test_foreign_safetensors_are_read(tmp_path):
    source = cifar_resnet.build("resnet8", 3, 3)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    target = cifar_resnet.build("resnet8", 3, 3)
    foreign_checkpoint.load_foreign_weights(target, tmp_path / "weights.safetensors")
    assert torch.equal(target.fc.weight, source.fc.weight)


def test_a_checkpoint_of_another_shape_is_refused_with_the_keys_that_do_not_fit(tmp_path):
    source = cifar_resnet.build("resnet8", 10, 3)
    state = source.state_dict()
    state["conv1.weight"] = state.pop("conv.weight")
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError) as refusal:
        foreign_checkpoint.load_foreign_weights(
            cifar_resnet.build("resnet8", 3, 3), tmp_path / "weights.pth"
        )
    message = str(refusal.value)
    assert "missing `conv.weight` [16, 3, 3, 3]; did you mean `conv1.weight`?" in message
    assert "unexpected `conv1.weight`" in message
    assert "`fc.weight` is [10, 64]; expected [3, 64]" in message


class Payload:
    """Pickled as a call that leaves a file behind."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def test_pickled_code_is_refused_unexecuted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Payload()}, "weights.pth")
    with pytest.raises(UserError, match="holds pickled objects, which could run code"):
        foreign_checkpoint.load_foreign_weights(
            cifar_resnet.build("resnet8", 3, 3), Path("weights.pth")
        )
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match="weights"):
        foreign_checkpoint.load_foreign_weights(cifar_resnet.build("resnet8", 3, 3), path)


def test_an_unknown_network_is_named_with_the_nearest():
    with pytest.raises(UserError, match="has no network `resnet9`; did you mean `resnet8`"):
        build(describe(network="resnet9"))


@pytest.mark.parametrize(
    ("network", "channels"),
    [("resnet18", 1), ("mobilenet_v2", 3), ("squeezenet1_1", 1), ("googlenet", 3)],
)
def test_torchvisions_networks_take_any_number_of_channels_and_classes(network, channels):
    spec = InputSpec(channels, 64, [0.5] * channels, [0.2] * channels)
    built = build(describe(family="torchvision", network=network, input=spec))
    views = torch.randint(0, 256, (2, channels, 64, 64), dtype=torch.uint8)
    for mode in (True, False):  # an auxiliary head would return more than logits in training
        assert built.train(mode)(spec.apply(views)).shape == (2, 3)


def test_torchvisions_options_reach_its_networks_and_unknown_names_are_refused():
    half = build(
        describe(family="torchvision", network="mobilenet_v2", options={"width_mult": 0.5})
    )
    assert sum(p.numel() for p in half.parameters()) < 1e6
    with pytest.raises(UserError, match="has no network `mobilenet_v9`; did you mean `mobilenet_v"):
        build(describe(family="torchvision", network="mobilenet_v9"))


def test_an_option_that_the_network_lacks_is_refused():
    with pytest.raises(UserError, match="does not take the options"):
        build(describe(options={"width": 2}))


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


@pytest.mark.parametrize(("network", "size"), [("alexnet", 224), ("vit_b_32", 224)])
def test_a_network_that_was_pretrained_is_refused_with_the_size_that_it_was_pretrained_at(
    network, size
):
    with pytest.raises(UserError, match=f"Set `input_size: {size}`, as it was pretrained"):
        build(describe(family="torchvision", network=network))


def test_a_network_that_does_not_return_logits_is_refused(monkeypatch):
    monkeypatch.setattr(cifar_resnet, "build", lambda *a: nn.Flatten())
    with pytest.raises(
        UserError, match=r"returns \[1, 768\] for one image; expected logits \[1, 3\]"
    ):
        build(describe())


@pytest.mark.parametrize(
    ("network", "parameters", "macs"),
    [  # of the literature's CIFAR-100 tables
        ("resnet8x4", 1.234e6, 177e6),
        ("resnet20", 0.278e6, 40.8e6),
        ("resnet32", 0.473e6, 69.1e6),
        ("resnet56", 0.862e6, 125.8e6),
        ("resnet110", 1.737e6, 253e6),
        ("resnet32x4", 7.434e6, 1083e6),
    ],
)
def test_parameters_and_macs_are_those_of_the_literature(network, parameters, macs):
    measured = count_parameters_and_macs(
        cifar_resnet.build(network, 100, 3), InputSpec(3, 32, [0] * 3, [1] * 3)
    )
    assert measured["parameters"] == pytest.approx(parameters, abs=0.5e3)
    assert measured["macs"] == pytest.approx(macs, rel=2e-3)


def test_metrics_agree_with_torchmetrics():
    torch.manual_seed(0)
    logits, labels = torch.randn(500, 20), torch.randint(0, 20, (500,))
    metrics = classification_metrics(logits, labels, "test")
    for name, k in (("test_accuracy", 1), ("test_top5_accuracy", 5)):
        expected = multiclass_accuracy(logits, labels, 20, average="micro", top_k=k).item()
        assert metrics[name] == pytest.approx(expected, abs=1e-6)
    expected = -torch.log_softmax(logits, 1)[torch.arange(500), labels].mean().item()
    assert metrics["test_nll"] == pytest.approx(expected, rel=1e-6)


def test_top5_of_fewer_than_five_classes_is_everything():
    logits, labels = torch.randn(10, 3), torch.randint(0, 3, (10,))
    assert classification_metrics(logits, labels, "test")["test_top5_accuracy"] == 1


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


def test_a_teacher_with_weights_that_are_not_numbers_is_refused(project):
    source = cifar_resnet.build("resnet8", 3, 3)
    with torch.no_grad():
        source.fc.weight[0, 0] = float("nan")
    torch.save(source.state_dict(), "mine.pth")
    teacher = PARAMS["teacher"] | {"weights": "checkpoint", "checkpoint": "mine.pth"}
    write_params(project, PARAMS | {"teacher": teacher})
    before = (TEACHER.model / "weights.safetensors").read_bytes()
    with pytest.raises(UserError, match="are not finite"):
        run_stage("teacher")
    assert (TEACHER.model / "weights.safetensors").read_bytes() == before
