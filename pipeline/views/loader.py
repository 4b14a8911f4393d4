"""Views of a split's samples, batch by batch, on their device.

The one place where images become views: the teacher, its soft targets, students, measurements and
canaries all get their pixels here.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.compute.device import to_device
from pipeline.data.prepared.dataset import AGAIN, AnySplit, EncodedSplit, Split, encoded_path
from pipeline.data.prepared.image_decoding import (
    UNREADABLE,
    available_cores,
    clean_boxes,
    decode_view,
)
from pipeline.runtime.errors import UserError
from pipeline.views.geometry import apply_rand_augment, apply_views, crop_boxes, flips
from pipeline.views.mixing import MixPlan, apply_mix, plan_mix
from pipeline.views.policy import ViewPolicy

RESIZED_CROP = "random_resized_crop"


@dataclass(frozen=True)
class Batch:
    samples: np.ndarray  # [B] sample numbers
    pixels: Tensor  # [B, C, H, W] uint8, on the device
    partners: np.ndarray | None = None  # [B] sample numbers; None if the policy does not mix
    weights: Tensor | None = None  # [B] float32, on the device: the share of the sample itself


@dataclass(frozen=True)
class _BatchPlan:
    """The images that one batch of a view needs."""

    samples: np.ndarray  # [B]
    mixing: MixPlan | None

    @property
    def all_samples(self) -> np.ndarray:
        """[B] or [2 B]: the samples, then their partners."""
        if self.mixing is None:
            return self.samples
        return np.concatenate([self.samples, self.mixing.partners])

    def batch(self, pixels: Tensor) -> Batch:
        """Mix the views of all samples, [B or 2 B, C, S, S] uint8, into the batch."""
        if self.mixing is None:
            return Batch(self.samples, pixels)
        sample_pixels, partner_pixels = pixels.tensor_split(2)
        weights = to_device(self.mixing.weights, pixels.device)
        mixed = apply_mix(sample_pixels, partner_pixels, self.mixing)
        return Batch(self.samples, mixed, self.mixing.partners, weights)


def make_view(
    images: Tensor,
    policy: ViewPolicy,
    seed: int,
    view: int,
    samples: np.ndarray,
    device: torch.device | str = "cpu",
) -> Batch:
    """Make one view of some samples, mixed with their partners' views if the policy mixes.

    Args:
        images: [N, C, S, S] uint8, the whole split, on the device or on the host.
        samples: [B] sample numbers.
    """
    mixing = plan_mix(policy, seed, view, samples, len(images), images.shape[-1])
    plan = _BatchPlan(samples, mixing)
    chosen = images[to_device(plan.all_samples, images.device)]
    if chosen.device.type != torch.device(device).type:  # `cuda` and `cuda:0` are not equal
        chosen = chosen.pin_memory().to(device, non_blocking=True)
    return plan.batch(apply_views(chosen, policy, seed, view, plan.all_samples))


def open_views(
    split: AnySplit,
    policy: ViewPolicy,
    seed: int,
    device: torch.device,
    *,
    num_workers: int | None = None,
) -> "Views | EncodedViews":
    """Open the views of a split, at the image size of its dataset.

    Args:
        num_workers: processes that decode encoded images; None: `default_workers()`. Unused for
            pixels.
    """
    if isinstance(split, EncodedSplit):
        workers = default_workers() if num_workers is None else num_workers
        return EncodedViews(split, policy, seed, device, workers)
    return Views(split, policy, seed, device)


def default_workers() -> int:
    """This process's share of the cores, among the processes that torchrun started here."""
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class Views:
    """The views of a split whose images are pixels of the views' size.

    The images are kept on the GPU if they fit in half of its free memory, otherwise on the host.
    """

    def __init__(self, split: Split, policy: ViewPolicy, seed: int, device: torch.device):
        images = torch.from_numpy(split.images)
        self._images = images.to(device) if _fits(images, device) else images
        self._policy, self._seed, self._device = policy, seed, device

    def batches(self, view: int, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        """Yield one view of the samples of each batch, in this order."""
        for samples in order:
            yield make_view(self._images, self._policy, self._seed, view, samples, self._device)


def _fits(images: Tensor, device: torch.device) -> bool:
    return device.type != "cuda" or 2 * images.nbytes <= torch.cuda.mem_get_info(device)[0]


class EncodedViews:
    """The views of a split of encoded images, decoded ahead by worker processes.

    Workers cut a view's box out of its image while decoding it, and mirror a resized crop. All
    other steps run on whole batches, on the device.
    """

    def __init__(
        self,
        split: EncodedSplit,
        policy: ViewPolicy,
        seed: int,
        device: torch.device,
        num_workers: int,
    ):
        self._split, self._policy, self._seed = split, policy, seed
        self._device, self._num_workers = device, num_workers

    def batches(self, view: int, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        """Yield one view of the samples of each batch, in this order.

        Raises:
            UserError: an image can no longer be decoded, or a worker has ended.
        """
        count, side = len(self._split), self._split.image_size
        plans = [
            _BatchPlan(s, plan_mix(self._policy, self._seed, view, s, count, side)) for s in order
        ]
        # The decoder has done the geometry of resized crops.
        resized = self._policy.geometry == RESIZED_CROP
        finish = apply_rand_augment if resized else apply_views
        decoded = self._decoded(view, [plan.all_samples for plan in plans])
        for plan, pixels in zip(plans, decoded, strict=True):
            yield plan.batch(finish(pixels, self._policy, self._seed, view, plan.all_samples))

    def _decoded(self, view: int, order: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """Yield each batch's decoded pixels, [B, C, S, S] uint8, on the device."""
        loader = DataLoader(
            _Decoder(self._split, self._policy, self._seed, view),
            batch_sampler=order,
            num_workers=min(self._num_workers, len(order)) if len(order) > 1 else 0,
            collate_fn=_unchanged,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # without it, each pass draws from the global generator
        )
        try:
            for pixels in loader:
                if isinstance(pixels, UserError):
                    raise pixels
                yield pixels.to(self._device, non_blocking=True)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a process that decodes images has ended ({error}); expected it to live as long "
                "as this one. Look at the machine's memory, and at its shared memory (/dev/shm)."
            ) from None


@dataclass(frozen=True)
class _Decoder:
    """The decoded pixels of one view, for worker processes: indexed with a batch's samples."""

    split: EncodedSplit
    policy: ViewPolicy
    seed: int
    view: int

    def __getitems__(self, samples: np.ndarray) -> Tensor | UserError:
        """[B, C, S, S] uint8; or an error, which the parent raises without a traceback."""
        split, side = self.split, self.split.image_size
        sizes = split.sizes[samples].astype(np.int64)  # [B, 2]
        if self.policy.geometry == RESIZED_CROP:
            boxes = crop_boxes(self.policy, self.seed, self.view, samples, sizes)
            flipped = flips(self.policy, self.seed, self.view, samples)
        else:
            boxes, flipped = clean_boxes(sizes, side), np.zeros(len(samples), bool)
        pixels = np.empty((len(samples), split.channels, side, side), np.uint8)
        for row, sample in enumerate(samples.tolist()):
            content = split.content(sample)
            try:
                decoded = decode_view(content, sizes[row], boxes[row], side, split.channels)
            except UNREADABLE as error:
                return UserError(
                    f"`{encoded_path(split.directory, split.name)}` has an image that cannot be "
                    f"decoded, sample {sample} ({error}); expected it as `prepare` wrote it. "
                    f"Remove `{split.directory}` and run `{AGAIN}`."
                )
            pixels[row] = decoded[:, :, ::-1] if flipped[row] else decoded
        return torch.from_numpy(pixels)


def _unchanged(batch: Tensor | UserError) -> Tensor | UserError:
    return batch
