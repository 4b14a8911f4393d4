"""Try a network on two images: its logits must depend on each image alone."""

import torch
from torch import Tensor, nn

from pipeline.models.family import describe_failure
from pipeline.models.spec import ModelSpec
from pipeline.runtime.errors import UserError

#: Of two equal logits, as a share of the largest number: rounding differs by some 1e-6.
TOLERANCE = 1e-3


def check_evaluation(network: nn.Module, spec: ModelSpec, advice: str = "") -> None:
    """Refuse a network whose logits of an image differ the second time, or in another batch.

    Args:
        advice: what to do; by default, what the author of the network's code can do.
    """
    images = two_images(spec)
    network.eval()
    with torch.inference_mode():
        first = logits_of(network, images, spec, "in evaluation", advice)
        alone = [logits_of(network, image[None], spec, "in evaluation", advice) for image in images]
        if nearly_equal(first, torch.cat(alone)):
            return
        again = logits_of(network, images, spec, "in evaluation", advice)
    if not nearly_equal(first, again):
        advice = advice or (
            "A function that draws random numbers must know the mode: "
            "`F.dropout(x, p, self.training)`."
        )
        raise UserError(
            f"network `{spec.network}` returns other logits for the same images in evaluation "
            f"mode; expected the same logits. {advice}"
        )
    raise UserError(
        f"network `{spec.network}` returns other logits for an image beside another one, in "
        "evaluation mode; expected logits that depend on the image alone. "
        f"{advice or 'Let no layer compute over the batch.'}"
    )


def two_images(spec: ModelSpec) -> Tensor:
    """Noise as a training's network gets it: [2, channels, size, size], channels last in memory."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, spec.input.channels, spec.input.size, spec.input.size)
    return spec.input.apply(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))


def logits_of(
    network: nn.Module, images: Tensor, spec: ModelSpec, mode: str, advice: str = ""
) -> Tensor:
    expected = [len(images), spec.num_classes]
    try:
        logits = network(images)
    except Exception as error:
        failure = describe_failure(error, spec.family)
        raise UserError(
            f"network `{spec.network}` fails {mode}, on images {list(images.shape)}: {failure}. "
            f"{advice}".rstrip()
        ) from None
    if not isinstance(logits, Tensor) or list(logits.shape) != expected:
        actual = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"network `{spec.network}` returns {actual} {mode}, for images {list(images.shape)}; "
            f"expected logits {expected}, as for one image in evaluation."
        )
    return logits


def nearly_equal(first: Tensor, second: Tensor) -> bool:
    """True also where fresh weights make numbers too large for float32."""
    difference = (first - second).abs().max().item()
    return not difference > TOLERANCE * first.abs().max().item()
