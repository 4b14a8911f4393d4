"""Published weights: found, fitted to the data set's classes, or fine-tuned to them."""

import io
import pickle
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import PARAMS, run_stage, write_params
from PIL import Image
from torch import nn

from pipeline.data.prepared.dataset import EncodedSplit, Split, open_dataset
from pipeline.initial_weights import published
from pipeline.initial_weights.class_rows import WORDNET_IDS, classes_among
from pipeline.initial_weights.head import head_parameters
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict_all
from pipeline.models.params import NetworkParams
from pipeline.models.spec import InputSpec, ModelSpec, build, model_spec, native_input
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.outputs import TEACHER
from pipeline.teacher.initial_network import build_initial_network
from pipeline.teacher.loop import fit_teacher
from pipeline.teacher.params import TeacherParams

CATEGORIES = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
CPU = torch.device("cpu")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch's hub, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    folder = tmp_path / "hub/hub/checkpoints"
    folder.mkdir(parents=True)
    return folder


def file_of(network: str) -> str:
    return Path(torchvision.models.get_model_weights(network).DEFAULT.url).name


def publish(hub: Path, name: str, network: nn.Module) -> None:
    torch.save(network.state_dict(), hub / file_of(name))


def describe(class_names: list[str], network: str = "resnet18", size: int = 32) -> ModelSpec:
    spec = InputSpec(3, size, [0.5] * 3, [0.2] * 3)
    return ModelSpec("torchvision", network, {}, class_names, spec)


@pytest.fixture
def whole(hub: Path) -> nn.Module:
    """A published ResNet-18 of ImageNet's classes."""
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    publish(hub, "resnet18", network)
    return network


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["n02123045", "n01440764"], [281, 0]),
        (["Tench", "great_white_shark", "toilet-tissue"], [0, 2, 999]),
        (["n01440764", "goldfish"], [0, 1]),
        (WORDNET_IDS, list(range(1000))),
        (CATEGORIES[::-1], list(range(1000))[::-1]),
    ],
)
def test_imagenets_classes_in_any_order_keep_their_rows(whole, names, numbers):
    network, description = published.load(describe(names))
    assert description.pretrained_classes == numbers
    for key, value in network.state_dict().items():
        expected = whole.state_dict()[key]
        assert torch.equal(value, expected[numbers] if key.startswith("fc.") else expected)


def test_classes_of_which_one_is_not_imagenets_start_with_a_new_last_layer(whole):
    network, description = published.load(describe(["ant", "bee", "unicorn"]))
    assert description.pretrained_classes is None
    assert network.fc.weight.shape == (3, 512)
    assert not torch.equal(network.fc.weight, whole.fc.weight[[310, 309, 0]])
    assert torch.equal(network.layer4[1].bn2.weight, whole.layer4[1].bn2.weight)


def test_a_name_that_two_classes_have_or_two_folders_of_one_class_match_nothing():
    assert classes_among(["crane"], ["crane", "goose", "crane"]) is None
    assert classes_among(["goose"], ["crane", "goose", "crane"]) == [1]
    assert classes_among(["goose", "Goose"], ["crane", "goose"]) is None
    assert classes_among(["cardigan", "Cardigan"], ["Cardigan", "cardigan"]) == [1, 0]
    assert classes_among(["n01440764"], ["crane", "goose"]) is None  # not ImageNet


def test_the_wordnet_ids_are_in_the_order_of_the_categories():
    assert len(set(WORDNET_IDS)) == len(CATEGORIES) == 1000
    assert list(WORDNET_IDS) == sorted(WORDNET_IDS)
    known = {"n01440764": "tench", "n02123045": "tabby", "n07747607": "orange", "n15075141": None}
    for wordnet_id, name in known.items():
        assert name in (CATEGORIES[WORDNET_IDS.index(wordnet_id)], None)


def test_published_weights_are_loaded_as_torchvision_loads_them(hub):
    """Those of DenseNets have the names of an older version, and are renamed."""
    torch.manual_seed(0)
    whole = torchvision.models.densenet121()
    old = {
        re.sub(r"(denselayer\d+\.(norm|conv))([12])", r"\1.\3", key): value
        for key, value in whole.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    torch.save(old, hub / file_of("densenet121"))
    network, _ = published.load(describe(["tench", "goldfish"], "densenet121"))
    loaded, expected = network.state_dict(), whole.state_dict()
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert torch.equal(loaded.pop("classifier.weight"), expected["classifier.weight"][:2])
    assert torch.equal(loaded.pop("classifier.bias"), expected["classifier.bias"][:2])
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())


def test_weights_that_cannot_be_downloaded_are_asked_for_by_file_and_place(hub):
    with pytest.raises(UserError) as refusal:
        published.load(describe(["ant", "bee"]))
    message = str(refusal.value)
    assert "the pretrained weights of `resnet18` cannot be downloaded (" in message
    assert (
        "Download https://download.pytorch.org/models/resnet18-f37072fd.pth yourself, and put it "
        f"at `{hub}/resnet18-f37072fd.pth`." in message
    )
    publish(hub, "resnet18", torchvision.models.resnet18())
    published.load(describe(["ant", "bee"]))  # as the message says


@pytest.mark.parametrize("content", [b"", b"nothing", pickle.dumps({"conv1.weight": print}, 2)])
def test_a_file_in_its_place_that_is_no_state_dict_is_refused(hub, content):
    (hub / file_of("resnet18")).write_bytes(content)
    with pytest.raises(UserError, match="pretrained weights of `resnet18` cannot be read"):
        published.load(describe(["ant", "bee"]))


def test_what_has_no_fitting_published_weights_is_refused(hub):
    publish(hub, "mobilenet_v2", torchvision.models.mobilenet_v2())
    half = replace(describe(["ant", "bee"], "mobilenet_v2"), options={"width_mult": 0.5})
    with pytest.raises(UserError, match="pretrained weights of `mobilenet_v2` does not fit"):
        published.load(half)
    with pytest.raises(UserError, match="family `cifar_resnet` has no pretrained weights"):
        published.load(replace(half, family="cifar_resnet"))
    auxiliary = replace(half, network="googlenet", options={"aux_logits": True})
    with pytest.raises(UserError, match="`googlenet` set `aux_logits`; .* Remove the option"):
        build(auxiliary)


def test_the_input_is_that_of_the_pretraining_unless_the_parameters_say_otherwise(project):
    dataset = open_dataset()

    def spec(**network: object) -> InputSpec:
        params = NetworkParams(**network)
        native = native_input("torchvision", params.name)
        return model_spec("torchvision", params, dataset, native=native).input

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    assert spec(name="efficientnet_b3") == InputSpec(3, 300, mean, std, 320 / 300, "bicubic")
    own = spec(name="resnet18", input_size=64, mean=[0.5] * 3)
    assert own == InputSpec(3, 64, [0.5] * 3, std, 256 / 224, "bilinear")
    own = spec(name="resnet18", resize_ratio=1.0, interpolation="bicubic")
    assert own == InputSpec(3, 224, mean, std, 1.0, "bicubic")
    with pytest.raises(UserError, match="no network `resnet9`"):
        spec(name="resnet9")
    dataset = replace(dataset, channels=1)
    with pytest.raises(UserError, match="pretrained on images of 3 channels, but `dataset.chan"):
        spec(name="resnet18")


def encoded_split(folder: Path, image: Image.Image) -> EncodedSplit:
    file = io.BytesIO()
    image.save(file, "PNG")
    (folder / "test_images.bin").write_bytes(file.getvalue())
    offsets, sizes = np.array([0, len(file.getvalue())]), np.array([image.size[::-1]], np.int32)
    return EncodedSplit(np.zeros(1, np.int64), folder, "test", offsets, sizes, 3, 96)


@pytest.mark.parametrize("network", ["resnet18", "resnet50", "efficientnet_b3", "inception_v3"])
@pytest.mark.parametrize("storage", ["pixels", "encoded"])
def test_images_become_the_pixels_of_the_published_preprocessing(network, storage, tmp_path):
    """torchvision's own transforms are the witness. Their two networks that turn ImageNet's
    normalisation into -1 to 1 themselves are compared in pixels, as the others."""
    weights = torchvision.models.get_model_weights(network).DEFAULT.transforms()
    spec = native_input("torchvision", network)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    image = coarse.resize((600, 400), Image.Resampling.BICUBIC)
    if storage == "pixels":  # as `prepare` cuts the middle square
        image = image.crop((100, 0, 500, 400))
        pixels = np.asarray(image).transpose(2, 0, 1)[None]
        split = Split(np.zeros(1, np.int64), tmp_path, "test", np.ascontiguousarray(pixels))
    else:
        split = encoded_split(tmp_path, image)
    ours = predict_all(nn.Identity(), spec, split, device=torch.device("cpu"))[0]
    levels = []
    for normalised, mean, std in (
        (ours, spec.mean, spec.std),
        (weights(image), weights.mean, weights.std),
    ):
        levels.append(
            255 * (normalised * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1))
        )
    assert ours.shape == (3, spec.size, spec.size)
    assert (levels[0] - levels[1]).abs().mean() < 1
    assert (levels[0] - levels[1]).abs().max() < 4.5


def test_googlenet_gets_the_pixels_that_its_weights_were_made_with(hub):
    """torchvision's own, built with weights, turns ImageNet's normalisation into -1 to 1 itself."""
    torch.manual_seed(0)
    whole = torchvision.models.googlenet(init_weights=True, aux_logits=True)
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of what comes, so that answers differ in size
    with torch.no_grad():
        whole.train()(torch.randn(8, 3, 64, 64))
    publish(hub, "googlenet", whole)
    own = torchvision.models.googlenet(init_weights=False, aux_logits=True, transform_input=True)
    own.load_state_dict(whole.state_dict())
    native = native_input("torchvision", "googlenet")
    assert native.size == 224
    imagenet = InputSpec(3, 64, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    network, _ = published.load(describe(CATEGORIES, "googlenet", 64))
    views = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        expected = own.eval()(imagenet.apply(views))
        torch.testing.assert_close(
            network.eval()(replace(native, size=64).apply(views)), expected, atol=1e-4, rtol=0
        )


def set_teacher(**changed: object) -> None:
    teacher = deepcopy(PARAMS["teacher"]) | {"family": "torchvision", "weights": "pretrained"}
    teacher["network"] = {"name": "resnet18", "input_size": 16}
    teacher["training"] |= {"learning_rate": 0.003, "batch_size": 12}
    write_params(Path(), PARAMS | {"teacher": teacher | changed})


def publish_what_knows_the_images(hub: Path) -> nn.Module:
    """A network trained on the project's images, by ImageNet's normalisation, as ImageNet's."""
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    network = {"name": "resnet18", "input_size": 16, "mean": mean, "std": std}
    set_teacher(weights="train", network=network)
    run_stage("teacher")
    known, _ = checkpoint.load(TEACHER.model, produced_by="-")
    whole, state = torchvision.models.resnet18(), known.state_dict()
    for key in ("fc.weight", "fc.bias"):
        rows = whole.state_dict()[key].clone()
        rows[[310, 309, 281]] = state[key]  # ant, bee, tabby
        state[key] = rows
    torch.save(state, hub / file_of("resnet18"))
    return known


def test_a_pretrained_teacher_is_taken_as_it_is_for_its_classes_and_fine_tuned_for_others(
    project, hub, capsys
):
    known = publish_what_knows_the_images(hub)
    training = {"epochs": 3, "freeze_epochs": 2, "learning_rate": 0.01}
    set_teacher(training=PARAMS["teacher"]["training"] | training)
    run_stage("teacher")
    assert "its last layer is new" in capsys.readouterr().out
    assert "pretrained_classes" not in read_json(TEACHER.model / "network.json", produced_by="-")

    Path("images/train/cat").rename("images/train/tabby")
    set_teacher(training=None)
    with pytest.raises(UserError, match="lacks some of the dataset's classes.*Add it, such as"):
        run_stage("teacher")
    run_stage("prepare")
    run_stage("teacher")
    output = capsys.readouterr().out
    assert "all classes are in its pretraining: it is used without training" in output
    assert "epoch" not in output
    taken, description = checkpoint.load(TEACHER.model, produced_by="-")
    assert description.pretrained_classes == [310, 309, 281]
    assert torch.equal(taken.fc.weight, known.fc.weight)
    assert read_json("metrics/teacher.json", produced_by="-")["validation_accuracy"] == 1.0


def fine_tuned(**training: object) -> nn.Module:
    dataset = open_dataset()
    teacher = TeacherParams(
        family="torchvision",
        network=NetworkParams(name="resnet18", input_size=16),
        weights="pretrained",
        checkpoint="",
        training=PARAMS["teacher"]["training"] | training,
    )
    network, description = build_initial_network(teacher, dataset)
    head = head_parameters(network, description)
    fit_teacher(network, description.input, dataset, teacher.training, CPU, head=head)
    return network


def same(before: nn.Module, after: nn.Module) -> dict[str, bool]:
    trained = after.state_dict()
    return {name: torch.equal(v, trained[name]) for name, v in before.state_dict().items()}


def test_frozen_epochs_train_the_last_layer_alone_and_all_layers_train_after_them(project, whole):
    after = fine_tuned(epochs=2, freeze_epochs=2, weight_decay=0.1)
    kept = same(whole, after)
    assert all(kept[key] for key in kept if not key.startswith("fc."))  # statistics, too
    assert all(parameter.grad is not None for parameter in after.fc.parameters())
    kept = same(whole, fine_tuned(epochs=2, freeze_epochs=1))
    assert not kept["conv1.weight"]
    assert not kept["bn1.running_mean"]


def test_frozen_batch_norm_keeps_its_statistics_alone(project, whole):
    kept = same(whole, fine_tuned(epochs=1, freeze_batch_norm=True, learning_rate=0.001))
    assert kept["bn1.running_mean"]
    assert kept["layer4.1.bn2.running_var"]
    assert not kept["conv1.weight"]
    assert not kept["bn1.weight"]
