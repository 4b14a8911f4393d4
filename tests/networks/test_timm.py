"""timm's networks follow the same rules as torchvision's."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.initial_weights import published
from pipeline.initial_weights.class_rows import last_layer
from pipeline.models.spec import InputSpec, ModelSpec, build, native_input
from pipeline.runtime.errors import UserError
from pipeline.teacher import foreign_teacher
from pipeline.training.data_parallel import synchronise_batch_norm

timm = pytest.importorskip("timm", reason="the extra `timm` is not installed")
from timm.layers import resample_abs_pos_embed  # noqa: E402


def describe(
    class_names: list[str], network: str = "test_resnet", size: int = 96, **options: object
) -> ModelSpec:
    spec = InputSpec(3, size, [0.5] * 3, [0.2] * 3)
    return ModelSpec("timm", network, options, class_names, spec)


def publish(hub: Path, network: str, **options: object) -> nn.Module:
    """Put fresh weights where those that timm publishes are read from."""
    torch.manual_seed(0)
    config = timm.get_pretrained_cfg(network)
    whole = timm.create_model(network, num_classes=config.num_classes, **options).eval()
    state = {key: value.contiguous() for key, value in whole.state_dict().items()}
    save_file(state, hub / f"timm_{config.architecture}.{config.tag}.safetensors")
    return whole


def test_a_network_with_weights_of_five_dimensions_is_built():
    build(describe(["a", "b"], "lambda_resnet26t", size=256))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, without a network connection."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub/hub/checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_a_network_of_timm_takes_any_number_of_channels_and_classes():
    spec = InputSpec(1, 64, [0.5], [0.2])
    description = ModelSpec("timm", "test_resnet", {}, ["a", "b", "c"], spec)
    views = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    assert build(description).train()(spec.apply(views)).shape == (2, 3)


def test_its_input_is_that_of_its_pretrained_cfg():
    # timm documents these for the two tags.
    assert native_input("timm", "resnet18.a1_in1k") == InputSpec(
        3, 224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 235 / 224, "bicubic"
    )
    inception = native_input("timm", "inception_v3.tf_in1k")
    assert inception == InputSpec(3, 299, [0.5] * 3, [0.5] * 3, 341 / 299, "bicubic")


def test_its_published_weights_keep_the_rows_of_known_classes(hub):
    whole = publish(hub, "test_resnet")
    network, description = published.load(describe(["n02123045", "tench"]))
    assert description.pretrained_classes == [281, 0]
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        torch.testing.assert_close(network.eval()(images), whole(images)[:, [281, 0]])
    network, description = published.load(describe(["unicorn", "tench"]))
    assert description.pretrained_classes is None
    assert torch.equal(network.conv1[0].weight, whole.conv1[0].weight)


def test_published_weights_without_a_classifier_get_one(hub):
    """As DINOv2, DINOv3, MAE and CLIP's ResNets have them."""
    whole = publish(hub, "convnextv2_atto.fcmae")
    network, description = published.load(describe(["tench", "goldfish"], "convnextv2_atto.fcmae"))
    assert description.pretrained_classes is None
    loaded = network.state_dict()
    assert {key for key in loaded if key not in whole.state_dict()} == last_layer(description)
    assert all(torch.equal(loaded[key], value) for key, value in whole.state_dict().items())


def test_a_transformer_at_another_size_gets_its_position_embedding_as_timm_resamples_it(hub):
    whole = publish(hub, "test_vit")
    assert native_input("timm", "test_vit").size == 160
    assert native_input("timm", "test_vit", {"img_size": 96}).size == 96
    network, description = published.load(describe(["tench", "goldfish"], "test_vit", img_size=96))
    assert description.pretrained_classes == [0, 1]
    before, after = whole.state_dict(), network.state_dict()
    expected = resample_abs_pos_embed(before["pos_embed"], [6, 6])
    torch.testing.assert_close(after["pos_embed"], expected)
    assert torch.equal(after["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])


def test_a_size_that_a_transformer_does_not_take_is_refused_with_the_option_that_sets_it(hub):
    with pytest.raises(
        UserError, match=r"Set `input_size: 160`, as it was pretrained, or `options: {img_size: 96}"
    ):
        published.load(describe(["a", "b"], "test_vit3"))
    with pytest.raises(UserError, match=r"\)\. Set `input_size: 64`, as its options say\.$"):
        published.load(describe(["a", "b"], "test_vit3", img_size=64))


def test_options_that_published_weights_do_not_fit_are_named(hub):
    publish(hub, "test_vit")
    with pytest.raises(
        UserError,
        match=r"pretrained weights of `test_vit` does not fit.*\s+unexpected `blocks.2.norm1",
    ):
        published.load(describe(["a", "b"], "test_vit", 160, depth=2))


@pytest.mark.parametrize("outputs", [3, 5])
def test_weights_of_the_repository_that_a_network_was_taken_from_are_converted(folder, outputs):
    torch.manual_seed(0)
    state = timm.create_model("test_convnext", num_classes=outputs).state_dict()
    of_facebook = {}
    for key, value in state.items():
        name = re.sub(r"stages\.(\d+)\.blocks\.", r"stages.\1.", key)
        name = re.sub(r"stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", name)
        name = name.replace("stem.", "downsample_layers.0.").replace("conv_dw", "dwconv")
        name = name.replace("mlp.fc", "pwconv").replace("head.fc.", "head.")
        of_facebook[name.replace("head.norm.", "norm.")] = value
    torch.save({"model": {f"module.{key}": v for key, v in of_facebook.items()}}, "mine.pth")
    spec = describe(["a", "b", "c"], "test_convnext")
    classes = None if outputs == 3 else [4, 0, 2]
    network, _ = foreign_teacher.load_foreign(spec, Path("mine.pth"), classes=classes)
    for key, value in network.state_dict().items():
        of_a_class = classes and key.startswith("head.fc.")
        assert torch.equal(value, state[key][classes] if of_a_class else state[key])
    del of_facebook["downsample_layers.0.0.weight"]
    torch.save(of_facebook, "mine.pth")
    with pytest.raises(UserError, match="does not fit the network"):
        foreign_teacher.load_foreign(spec, Path("mine.pth"), classes=classes)


def test_a_failed_download_names_the_file_and_its_place(hub):
    message = (
        "the pretrained weights of `test_resnet` cannot be downloaded .*Download "
        "`model.safetensors` from https://huggingface.co/timm/test_resnet.r160_in1k yourself, and "
        f"put it at `{hub}/timm_test_resnet.r160_in1k.safetensors`."
    )
    with pytest.raises(UserError, match=message):
        published.load(describe(["ant", "bee"]))


def test_unknown_networks_tags_and_absent_weights_are_refused():
    with pytest.raises(UserError, match="has no network `resnet19`; did you mean `resnet1"):
        build(describe(["a", "b"], "resnet19"))
    with pytest.raises(
        UserError, match=r"no weights `x` of `resnet18`. Known: .*resnet18\.a1_in1k"
    ):
        build(describe(["a", "b"], "resnet18.x"))
    with pytest.raises(UserError, match="timm publishes no weights of `botnet50ts_256`"):
        published.load(describe(["a", "b"], "botnet50ts_256", 256))


def test_batch_norm_with_an_activation_keeps_it_when_several_processes_synchronise_it(tmp_path):
    init_method = f"file://{tmp_path / 'group'}"
    torch.distributed.init_process_group("gloo", init_method=init_method, rank=0, world_size=1)
    try:
        ours, theirs = (timm.layers.BatchNormAct2d(5, drop_layer=nn.Dropout) for _ in range(2))
        synchronise_batch_norm(ours)
        for training in (True, False):
            outputs = []
            for norm in (ours, theirs):
                torch.manual_seed(0)
                outputs.append(norm.train(training)(torch.randn(4, 5, 3, 3)))
            torch.testing.assert_close(*outputs)
            synchronise_batch_norm(ours)  # as when frozen layers begin to train
    finally:
        torch.distributed.destroy_process_group()
