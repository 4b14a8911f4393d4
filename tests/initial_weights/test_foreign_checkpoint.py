"""Which weights of a checkpoint are taken, and by which names."""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import DenseNet, VisionTransformer

from pipeline.initial_weights.class_rows import WORDNET_IDS
from pipeline.initial_weights.foreign_checkpoint import find_layers
from pipeline.initial_weights.head import head_parameters
from pipeline.initial_weights.state_dict import Key
from pipeline.models import checkpoint
from pipeline.models.spec import InputSpec, ModelSpec, build
from pipeline.networks import cifar_resnet
from pipeline.networks import torchvision as torchvision_family
from pipeline.runtime.errors import UserError
from pipeline.teacher import foreign_teacher

State = dict[str, torch.Tensor]
INPUT = InputSpec(3, 32, [0.5] * 3, [0.2] * 3)


def describe(
    network: str = "resnet8",
    family: str = "cifar_resnet",
    class_names: tuple[str, ...] = ("ant", "bee", "cat"),
    **options: object,
) -> ModelSpec:
    return ModelSpec(family, network, options, class_names, INPUT)


def state_of(seed: int, num_classes: int = 3) -> State:
    torch.manual_seed(seed)
    return dict(cifar_resnet.build("resnet8", num_classes, 3).state_dict())


def load(content: object, **arguments: object) -> State:
    """The weights that a file of this content gives."""
    torch.save(content, "mine.pth")
    network, _ = foreign_teacher.load_foreign(describe(), Path("mine.pth"), **arguments)
    return network.state_dict()


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) for key in found
    )


def renamed(state: State, old: str, new: str) -> State:
    return {key.replace(old, new): value for key, value in state.items()}


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


# Wrappers.

WRAPPED: dict[str, Callable[[State], object]] = {
    "compiled part": lambda s: renamed(s, "blocks.", "blocks._orig_mod."),
    "compiled and distributed": lambda s: under("_orig_mod.module.", s),
    "FSDP": lambda s: under("_fsdp_wrapped_module.", renamed(s, ".1.", ".1._fsdp_wrapped_module.")),
    "checkpointed": lambda s: renamed(s, "blocks.0.", "blocks.0._checkpoint_wrapped_module."),
    "Fabric": lambda s: under("_forward_module.", s),
    "backbone": lambda s: {"state_dict": under("backbone.", s)},
    "body and head": lambda s: {
        f"{'head' if key.startswith('fc') else 'backbone'}.{key}": v for key, v in s.items()
    },
    "a body alone": lambda s: {
        f"{'' if key.startswith('fc') else 'resnet.'}{key}": v for key, v in s.items()
    },
    "Lightning with class weights": lambda s: {
        "state_dict": {**under("model.", s), "criterion.weight": torch.ones(3)}
    },
    "the second of a sequence": lambda s: {**under("1.", s), "0.mean": torch.ones(3)},
    "deep": lambda s: {"a": [{"b": (under("system.student.net._orig_mod.", s), 5)}]},
    "a tuple": lambda s: (s, 5),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_wrappers_are_removed_wherever_they_stand(folder, kind):
    assert same(load(WRAPPED[kind](state_of(0))), state_of(0))


class Backbone(nn.Module):
    """A network with parts that are named as wrappers are."""

    def __init__(self):
        super().__init__()
        self.module = nn.Conv2d(3, 4, 3, padding=1)
        self.backbone = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3))
        self.model = nn.Linear(4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(self.backbone(self.module(images)).mean((2, 3)))


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "model._orig_mod."])
def test_parts_that_are_named_as_wrappers_are_keep_their_names(folder, monkeypatch, prefix):
    monkeypatch.setattr(cifar_resnet, "build", lambda *_: Backbone())
    torch.manual_seed(3)
    state = Backbone().state_dict()
    assert same(load(under(prefix, state)), state)


def test_everything_else_is_ignored_with_a_line_that_counts_and_names_it(folder, capsys):
    state = state_of(0)
    content = {
        "state_dict": {**state, "total_ops": torch.zeros(1), "total_params": torch.zeros(1)},
        "arch": "resnet8",
        "args": argparse.Namespace(lr=0.1),
        "best_acc": np.float64(75.0),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3), "step": torch.ones(1)}}},
    }
    assert same(load(content), state)
    assert capsys.readouterr().out.splitlines() == [
        "  mine.pth: the weights under `state_dict`",
        "  mine.pth: ignored 6 entries: `state_dict.total_ops`, `state_dict.total_params`, `arch`, "
        "`args` (argparse.Namespace), `best_acc` (numpy._core.multiarray.scalar), `optimizer` "
        "(2 tensors)",
    ]
    for beside in (
        *("total_ops", "_extra_state", "conv1.weight_fake_quant.scale", "conv1.weight_mask"),
        *("activation_post_process.histogram", "attn.relative_position_index"),
    ):
        content = {**state, "epoch": 5, f"blocks.0.{beside}": torch.ones(1)}
        assert same(load(content), state)
        assert same(load({"state_dict": under("module.resnet.", content)}), state)


def test_a_missing_weight_and_a_further_layer_are_never_ignored(folder):
    state = state_of(0)
    del state["fc.bias"]
    for content in (state, {"model": under("module.", state)}):
        with pytest.raises(UserError, match=r"missing `fc.bias` \[3\]"):
            load(content)
    larger = dict(cifar_resnet.build("resnet14", 3, 3).state_dict())
    further = ("conv.bias", "blocks.0.scale.gamma", "bn.running_max")
    others = ({**state_of(0), name: torch.ones(16)} for name in further)
    for content in (larger, under("module.", larger), *others):
        with pytest.raises(UserError, match="unexpected `"):
            load(content)
        with pytest.raises(UserError, match=r"unexpected `[\w.]*(weight|bias|gamma|running_max)`"):
            load({"state_dict": under("resnet.", content)})


def test_two_tensors_for_one_name_are_refused(folder):
    state = WRAPPED["body and head"](state_of(0))
    message = "several tensors for `fc.weight` .* `head.fc.weight`, `aux.fc.weight`"
    with pytest.raises(UserError, match=message):
        load({**state, "aux.fc.weight": state["head.fc.weight"]})


def test_the_moments_of_an_optimizer_are_no_averaged_weights(folder):
    state = state_of(0)
    moments = {"exp_avg": {k: torch.zeros_like(v) for k, v in state.items()}}
    for name in ("optimizer", "optimizer_states", "net_optim"):
        assert same(load({"model": state, name: moments}), state)
    assert same(load({"optimized_net": state}), state)
    with pytest.raises(UserError, match="holds 2 sets of weights"):
        load({"model": state, **moments})


def test_a_network_of_a_fixed_number_of_classes_is_refused_by_what_does_not_fit(
    folder, monkeypatch
):
    three = cifar_resnet.build("resnet8", 3, 3)

    def build_three(_: str, num_classes: int, *__: object) -> nn.Module:
        assert num_classes == 3
        return three

    monkeypatch.setattr(cifar_resnet, "build", build_three)
    with pytest.raises(UserError, match=r"`fc.bias` is \[4\]; expected \[3\]"):
        load({**state_of(0), "fc.bias": torch.zeros(4)})


def test_safetensors_are_read_under_any_name(folder):
    save_file(state_of(0), "mine.pth")
    network, _ = foreign_teacher.load_foreign(describe(), Path("mine.pth"))
    assert same(network.state_dict(), state_of(0))


# Which of several.

AVERAGED = [
    *("ema_model", "model_ema", "swa_state_dict", "model_ema_state_dict", "EMA", "averaged_model"),
    *("net_ema_0.999", "emaModel", "state_dict_avg", "EMAModel", "ema.module.model", "swa-weights"),
]


@pytest.mark.parametrize(
    ("name", "raw"), list(zip(AVERAGED, 4 * ["model", "state_dict", "net"], strict=True))
)
def test_averaged_weights_are_found_by_a_part_of_their_name(folder, capsys, name, raw):
    content = {raw: state_of(0), name: under("module.", state_of(1)), "it": 7}
    assert same(load(content), state_of(1))
    assert f"the weights under `{name}`\n" in capsys.readouterr().out
    assert same(load(content, key=raw), state_of(0))


def test_averaged_weights_of_torch_are_taken(folder):
    torch.manual_seed(0)
    network = cifar_resnet.build("resnet8", 3, 3)
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for parameter in network.parameters():
        parameter.data.add_(1)
    average.update_parameters(network)
    average.update_parameters(network)
    expected = average.module.state_dict()
    assert same(load({"model": network.state_dict(), "ema": average.state_dict()}), expected)
    assert same(load(average.state_dict()), expected)


def test_averaged_weights_that_do_not_fit_are_refused_not_passed_over(folder):
    raw, averaged = state_of(0), state_of(1)
    flat = {f"model_ema.{k.replace('.', '')}": v for k, v in averaged.items()}
    for content in (
        {"model": raw, "ema": {k: v for k, v in averaged.items() if "running" not in k}},
        {"model": raw, "ema": {"decay": 0.9, "shadow_params": list(averaged.values())}},
        {"state_dict": {**under("model.", raw), **flat}},
    ):
        with pytest.raises(
            UserError, match=r"averaged weights \(EMA\), \d+ tensors under .* do no"
        ):
            load(content)
    assert same(load({"model": raw, "ema": {"decay": torch.tensor(0.9)}}), raw)


@pytest.mark.parametrize("names", [("model", "teacher"), ("state_dict", "model"), ("a.b", "a.c")])
def test_two_candidates_of_unknown_meaning_are_refused_with_the_line_that_chooses(folder, names):
    content = dict(zip(names, (state_of(0), state_of(1)), strict=True))
    flat = {**under(f"{names[0]}.", state_of(0)), **under(f"{names[1]}.", state_of(1))}
    for version in (content, flat):
        message = f"`{names[0]}`, `{names[1]}`; .* `teacher.checkpoint_key: {names[0]}`"
        with pytest.raises(UserError, match=message):
            load(version)
        for seed, name in enumerate(names):
            assert same(load(version, key=name), state_of(seed))
    assert same(load(dict.fromkeys(names, state_of(0))), state_of(0))  # the same twice
    assert same(load({names[0]: state_of(0), names[1]: state_of(0)}), state_of(0))


def test_a_key_that_is_not_there_is_refused_with_the_known_ones(folder):
    content = {"model": state_of(0), "teacher": {"net": state_of(1)}}
    with pytest.raises(
        UserError, match="nothing at `modell` .*; did you mean `model`.*`teacher`, `teacher.net`"
    ):
        load(content, key="modell")
    assert same(load(content, key="teacher"), state_of(1))
    assert same(load(content, key="teacher.net"), state_of(1))
    bare = {**state_of(0), **under("ema.", state_of(1))}
    assert same(load(bare), state_of(1))
    assert same(load(bare, key=""), state_of(0))


# Outputs of another class list.

NAMES = ["dog", "cat", "Ant", "horse", "bee"]


def load_classes(
    num_outputs: int, classes: list[int] | list[str] | None, names: tuple[str, ...] | None = None
) -> tuple[nn.Module, ModelSpec]:
    torch.save({"model": under("module.", state_of(0, num_outputs))}, "mine.pth")
    spec = describe(class_names=names or ("ant", "bee", "cat"))
    return foreign_teacher.load_foreign(spec, Path("mine.pth"), classes=classes)


@pytest.mark.parametrize("classes", [NAMES, [2, 4, 1]])
def test_a_list_of_names_or_numbers_takes_the_outputs_of_the_datasets_classes(folder, classes):
    network, spec = load_classes(5, classes)
    whole = cifar_resnet.build("resnet8", 5, 3).eval()
    whole.load_state_dict(state_of(0, 5))
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(images), whole(images)[:, [2, 4, 1]])
    assert spec.pretrained_classes == [2, 4, 1]


def test_a_list_of_names_or_numbers_sets_another_order(folder):
    for classes in ([2, 0, 1], ["bee", "cat", "ant"]):
        network, _ = load_classes(3, classes)
        assert torch.equal(network.fc.bias, state_of(0)["fc.bias"][[2, 0, 1]])


def test_a_list_of_a_thousand_ids_or_names_is_taken_in_its_own_order(folder):
    folders = tuple(WORDNET_IDS[:3])
    _, spec = load_classes(1000, WORDNET_IDS[::-1], folders)
    assert spec.pretrained_classes == [999, 998, 997]
    with pytest.raises(UserError, match=f"does not say which output is `{folders[0]}`"):
        load_classes(1000, [f"name {number}" for number in range(1000)], folders)


@pytest.mark.parametrize("classes", [NAMES[:3], [2, 1, 0]])
def test_a_list_for_a_network_that_cannot_select_outputs_is_refused(folder, monkeypatch, classes):
    fixed = cifar_resnet.build("resnet8", 3, 3)
    for make in (lambda *_: fixed, lambda _, num_classes, __: ByColumns(num_classes)):
        monkeypatch.setattr(cifar_resnet, "build", make)
        torch.save(make("", 3, 3).state_dict(), "mine.pth")
        with pytest.raises(UserError, match="no last layer with one row for each class"):
            foreign_teacher.load_foreign(describe(), Path("mine.pth"), classes=classes)


class ByColumns(nn.Module):
    """Its classes are columns of the last layer, as in networks that compare by cosine."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.proj, self.bias = (
            nn.Parameter(torch.ones(s)) for s in ((3, num_classes), num_classes)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) @ self.proj + self.bias


def test_the_last_layer_is_all_that_depends_on_the_number_of_classes(monkeypatch):
    monkeypatch.setattr(cifar_resnet, "build", lambda _, num_classes, __: ByColumns(num_classes))
    assert head_parameters(ByColumns(3), describe()) == {"proj", "bias"}


def test_a_file_with_fewer_outputs_than_classes_is_refused_without_advice_that_cannot_help(folder):
    with pytest.raises(UserError, match="has 2 outputs, and the dataset has 3 classes. Choose an"):
        load_classes(2, None)


def test_outputs_of_another_number_are_refused_with_the_parameter_that_maps_them(folder):
    with pytest.raises(UserError, match=r"has 5 outputs, and .* 3 classes. Set `teacher.checkpoin"):
        load_classes(5, None)
    for classes, message in (
        ([0, 1], "has 2 numbers; expected 3"),
        ([0, 1, 5], "has 5; expected different numbers from 0 to 4"),
        ([0, 1, 1], "has a number twice; expected different"),
        (["ant", "bee", "cat"], "has 3 names, but the checkpoint has 5 outputs"),
        (["dog", "cat", "ants", "horse", "bee"], "which output is `ant`.*; did you mean `ants`"),
        (["ant", "cat", "ant", "horse", "bee"], "which output is `ant`"),
    ):
        with pytest.raises(UserError, match=message):
            load_classes(5, classes)


def test_folders_of_imagenets_classes_take_its_outputs_of_a_thousand(folder, capsys):
    for names in (("n01440764", "n01443537", "n02123045"), ("Tench", "goldfish", "tabby")):
        network, spec = load_classes(1000, None, names)
        assert spec.pretrained_classes == [0, 1, 281]
        assert "1,000 outputs, taken as ImageNet's classes" in capsys.readouterr().out
        assert torch.equal(network.fc.bias, state_of(0, 1000)["fc.bias"][[0, 1, 281]])
    with pytest.raises(UserError, match="has 1,000 outputs"):
        load_classes(1000, None)


# Versions and renamings of libraries.


def load_tv(network: str, **options: object) -> nn.Module:
    spec = describe(network, "torchvision", **options)
    return foreign_teacher.load_foreign(spec, Path("mine.pth"))[0]


def test_densenets_old_names_are_read(folder, monkeypatch):
    def small(_: str, num_classes: int, *__: object) -> nn.Module:
        return DenseNet(4, (2, 2), 8, num_classes=num_classes)

    monkeypatch.setattr(torchvision_family, "build", small)
    torch.manual_seed(1)
    state = small("", 3).state_dict()
    old = {
        key.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): value
        for key, value in state.items()
    }
    assert old.keys() != state.keys()
    torch.save({"state_dict": under("module.", old)}, "mine.pth")
    assert same(load_tv("densenet121").state_dict(), state)


#: (family, network) -> names here, and in the checkpoints of the literature's tables.
LITERATURE = {
    ("cifar_resnet", "resnet14"): {
        "conv.": "conv1.",
        "bn.": "bn1.",
        "blocks.0.": "layer1.0.",
        "blocks.1.": "layer1.1.",
        "blocks.2.shortcut.": "layer2.0.downsample.",
        "blocks.2.": "layer2.0.",
        "blocks.3.": "layer2.1.",
        "blocks.4.shortcut.": "layer3.0.downsample.",
        "blocks.4.": "layer3.0.",
        "blocks.5.": "layer3.1.",
    },
    ("wide_resnet", "wrn_16_2"): {
        "conv.": "conv1.",
        "bn.": "bn1.",
        "blocks.0.shortcut.": "block1.layer.0.convShortcut.",
        "blocks.0.": "block1.layer.0.",
        "blocks.1.": "block1.layer.1.",
        "blocks.2.shortcut.": "block2.layer.0.convShortcut.",
        "blocks.2.": "block2.layer.0.",
        "blocks.3.": "block2.layer.1.",
        "blocks.4.shortcut.": "block3.layer.0.convShortcut.",
        "blocks.4.": "block3.layer.0.",
        "blocks.5.": "block3.layer.1.",
    },
    ("cifar_vgg", "vgg8"): {
        "stages.0.": "block0.",
        "stages.1.": "block1.",
        "stages.2.": "block2.",
        "stages.3.": "block3.",
        "stages.4.": "block4.",
        "fc.": "classifier.",
    },
}


@pytest.mark.parametrize("classes", [None, [0, 3, 1]])
@pytest.mark.parametrize(("family", "network"), LITERATURE)
def test_the_names_of_the_literatures_checkpoints_are_read(
    folder, capsys, family, network, classes
):
    description = describe(network, family)
    torch.manual_seed(1)
    wide = replace(description, class_names=["of the file"] * (4 if classes else 3))
    state, names = build(wide).state_dict(), LITERATURE[family, network]

    def literature(key: str) -> str:
        here = next((here for here in names if key.startswith(here)), "")
        return names.get(here, "") + key.removeprefix(here)

    theirs = {literature(key): value for key, value in state.items()}
    torch.save({"epoch": 240, "model": theirs}, "mine.pth")
    loaded, _ = foreign_teacher.load_foreign(description, Path("mine.pth"), classes=classes)
    assert "ignored 1 entry: `epoch`" in capsys.readouterr().out
    rows = classes or [0, 1, 2]
    state |= {key: state[key][rows] for key in ("fc.weight", "fc.bias")}
    assert same(loaded.state_dict(), dict(state))


def test_a_larger_network_of_the_literature_is_refused(folder):
    names = LITERATURE["cifar_resnet", "resnet14"]
    state = build(describe("resnet14")).state_dict()
    for here, literature in names.items():
        state = {
            literature + key.removeprefix(here) if key.startswith(here) else key: value
            for key, value in state.items()
        }
    torch.save(state, "mine.pth")
    with pytest.raises(UserError, match="`mine.pth` does not fit the network"):
        foreign_teacher.load_foreign(describe("resnet8"), Path("mine.pth"))


def test_vision_transformers_old_names_are_read(folder, monkeypatch):
    def small(_: str, num_classes: int, *__: object) -> nn.Module:
        return VisionTransformer(32, 16, 1, 2, 8, 16, num_classes=num_classes)

    monkeypatch.setattr(cifar_resnet, "build", small)
    torch.manual_seed(1)
    state = small("", 3).state_dict()
    old = {
        k.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): v
        for k, v in state.items()
    }
    assert old.keys() != state.keys()
    assert same(load({"model": under("module.", old)}), state)


def test_mnasnet_is_saved_and_loaded(folder):
    network = "mnasnet0_5"
    spec = describe(network, "torchvision")
    torch.manual_seed(1)
    built = build(spec).eval()
    checkpoint.save(Path(), built, spec)
    again, _ = checkpoint.load(Path(), produced_by="-")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(built(images), again.eval()(images))
    for content in (built.state_dict(), dict(built.state_dict())):
        torch.save(content, "mine.pth")
        assert same(load_tv(network).state_dict(), built.state_dict())
    save_file({k: v.contiguous() for k, v in built.state_dict().items()}, "mine.pth")
    assert same(load_tv(network).state_dict(), built.state_dict())


def test_mnasnet_of_an_older_version_is_loaded_and_saved_as_such(folder):
    torch.manual_seed(1)
    old = torchvision.models.mnasnet0_5(num_classes=3)
    of_version_1 = old.state_dict()
    of_version_1._metadata[""]["version"] = 1
    with warnings.catch_warnings():  # an old stem has 32 and 16 channels, at any width
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="size mismatch"):
            old.load_state_dict(of_version_1)
    old.eval()
    state = old.state_dict()
    assert old._version == 1
    assert state["layers.0.weight"].shape[0] == 32
    torch.save(state, "mine.pth")
    network = load_tv("mnasnet0_5").eval()
    images = torch.randn(2, 3, 32, 32)
    checkpoint.save(Path(), network, describe("mnasnet0_5", "torchvision"))
    again, _ = checkpoint.load(Path(), produced_by="-")
    with torch.inference_mode():
        torch.testing.assert_close(network(images), old(images))
        assert torch.equal(again.eval()(images), network(images))


# A part of the layers: `partial: true`.


def layers(content: object, value: str | None = None) -> State:
    torch.save(content, "mine.pth")
    key = Key(value, "students.s.network.weights.key")
    return dict(find_layers(build(describe()), Path("mine.pth"), key).state)


def larger(seed: int) -> State:
    torch.manual_seed(seed)
    return dict(cifar_resnet.build("resnet20", 5, 3).state_dict())


@pytest.mark.parametrize("make", [state_of, larger])
def test_of_several_sets_the_averaged_one_gives_its_layers(folder, make):
    averaged, raw = make(0), make(1)
    for content in (
        {"model": raw, "model_ema": averaged},
        {"state_dict_ema": averaged, "state_dict": raw},
        {"state_dict": raw, "ema": {"module": averaged}},
    ):
        found = layers(content)
        assert torch.equal(found["conv.weight"], averaged["conv.weight"])
        assert all(torch.equal(found[name], averaged[name]) for name in found)
        (first,) = [key for key, value in content.items() if value is raw]
        assert torch.equal(layers(content, first)["conv.weight"], raw["conv.weight"])


def test_a_key_names_the_layers_that_are_taken_though_averaged_ones_are_below_it(folder):
    averaged, raw = state_of(0), state_of(1)
    nested = {**raw, **under("ema.", averaged)}
    found = layers({"model": nested}, "model")
    assert all(torch.equal(found[name], raw[name]) for name in raw)
    assert same(layers({"model": nested}), averaged)


def test_averaged_layers_that_come_less_near_are_not_passed_over_in_silence(folder):
    averaged, raw = state_of(0), state_of(1)
    parameters = {k: v for k, v in averaged.items() if "running" not in k and "num_b" not in k}
    with pytest.raises(UserError, match=r"holds averaged weights \(EMA\), 29 tensors under"):
        layers({"model": raw, "model_ema": parameters})


def test_a_set_of_layers_is_never_mixed_of_two(folder):
    whole, cut = state_of(0), state_of(1)
    cut = {name: value for name, value in cut.items() if not name.startswith("blocks.2")}
    assert same(layers({"state_dict_ema": whole, "state_dict": cut}), whole)
    assert same(layers({"a": cut, "b": whole}), whole)


def test_of_two_sets_that_are_equally_near_none_is_guessed(folder):
    with pytest.raises(UserError, match=r"holds 2 sets .*`student`, `teacher`; expected one"):
        layers({"student": state_of(0), "teacher": state_of(1)})
    strided = {name: torch.stack([value, value], -1)[..., 0] for name, value in state_of(0).items()}
    assert same(layers({"student": state_of(0), "teacher": strided}), state_of(0))


def test_the_moments_of_an_optimizer_are_no_layers(folder):
    state = state_of(0)
    moments = {
        name: {"exp_avg": torch.full_like(value, 7), "exp_avg_sq": torch.full_like(value, 9)}
        for name, value in state.items()
        if value.is_floating_point()
    }
    assert same(layers({"model": state, "optimizer": {"state": moments}}), state)
    with pytest.raises(UserError, match="expected one set of weights"):
        layers({"optimizer": {"state": moments}})


def test_of_mmengine_state_dict_is_the_average(folder):
    """Its EMAHook swaps the two when it saves."""
    averaged, raw = state_of(0), state_of(1)
    content = {
        "meta": {"mmengine_version": "0.10.4"},
        "state_dict": averaged,
        "ema_state_dict": {"steps": torch.tensor(9), **under("module.", raw)},
    }
    assert same(load(content), averaged)
    assert same(layers(content), averaged)
    assert same(load(content, key="ema_state_dict"), raw)
    del content["meta"]
    assert same(load(content), raw)
