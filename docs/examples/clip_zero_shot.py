"""CLIP's zero-shot classifier of your classes as one ONNX file: a teacher of `family: onnx`.

    python -m pip install open_clip_torch
    dvc repro prepare        # it writes the names of the classes
    python -m docs.examples.clip_zero_shot ViT-B-32-quickgelu openai

It writes models/imported/clip_zero_shot.onnx and prints the lines for params.yaml. The file has the
image tower, the classes' text embeddings, and the scale that CLIP has learnt. Its outputs are the
logits scale * cos(image, text) (Radford et al. 2021, arXiv:2103.00020, section 3.1.2).

The texts are the folders' names, or torchvision's for ImageNet's WordNet ids; `--names FILE` gives
others, one a line. `none` instead of `openai` takes random weights, to try the export.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.prepared.dataset import open_dataset
from pipeline.initial_weights.class_rows import WORDNET_IDS, imagenet_names

FILE = Path("models/imported/clip_zero_shot.onnx")


class ZeroShot(nn.Module):
    """[B, 3, S, S] normalised pixels -> [B, num_classes] logits."""

    def __init__(self, image_tower: nn.Module, text_embeddings: Tensor, scale: float):
        super().__init__()
        self.image_tower = image_tower
        # [num_classes, D], of length `scale`
        self.register_buffer("texts", scale * F.normalize(text_embeddings, dim=1))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.image_tower(images), dim=1) @ self.texts.T


def export(network: nn.Module, size: int, path: Path) -> None:
    """Write the network for images of `size` pixels, with its weights inside the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        network.eval(),
        (torch.zeros(2, 3, size, size),),  # a batch of 1 would fix the batch size
        path,
        input_names=["images"],
        output_names=["logits"],
        opset_version=18,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        dynamo=True,
    )


def texts_of(class_names: Sequence[str]) -> list[str]:
    """The words for the prompts."""
    by_id = dict(zip(WORDNET_IDS, imagenet_names(), strict=True))
    return [by_id.get(name, name).replace("_", " ") for name in class_names]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="open_clip.list_pretrained() lists models and weights")
    parser.add_argument("weights", help="the tag of the weights, or none")
    parser.add_argument("--names", type=Path, help="a text for each class, one a line")
    parser.add_argument("--output", type=Path, default=FILE)
    arguments = parser.parse_args()

    import open_clip  # noqa: PLC0415  (the rest does without it)

    class_names = open_dataset().class_names
    texts = texts_of(class_names)
    if arguments.names:
        texts = arguments.names.read_text("utf-8").splitlines()
        if len(texts) != len(class_names):
            parser.error(f"{arguments.names} has {len(texts)} lines; expected {len(class_names)}")

    weights = None if arguments.weights == "none" else arguments.weights
    model = open_clip.create_model(arguments.model, pretrained=weights).eval()
    embeddings = open_clip.build_zero_shot_classifier(  # [D, num_classes]
        model,
        open_clip.get_tokenizer(arguments.model),
        texts,
        open_clip.SIMPLE_IMAGENET_TEMPLATES,
    )
    tower = model.visual
    size = tower.image_size if isinstance(tower.image_size, int) else tower.image_size[0]
    with torch.no_grad():
        network = ZeroShot(tower, embeddings.T, model.logit_scale.exp().item())
    export(network, size, arguments.output)
    print(
        f"""
teacher:
  family: onnx
  network:
    name: clip
    input_size: {size}
    mean: {list(tower.image_mean)}
    std: {list(tower.image_std)}
    resize_ratio: 1.0
    interpolation: bicubic
  weights: checkpoint
  checkpoint: {arguments.output}"""
    )


if __name__ == "__main__":
    main()
