"""Views of a split's samples, batch by batch, on the device that takes them.

The one place where images become views: the teacher, its soft targets, students, measurements and
canaries all get their pixels here. Contract code: an edit here runs the teacher again.
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

# Imported here, not where they are first used: `loaded_code` fingerprints the loaded modules.
from pipeline.views import rand_augment, resampling  # noqa: F401
from pipeline.views.plan import (
    MixPlan,
    ViewPolicy,
    apply_mix,
    apply_views,
    crop_boxes,
    flips,
    photometry,
    plan_mix,
)

RESIZED_CROP = "random_resized_crop"


@dataclass(frozen=True)
class Batch:
    samples: np.ndarray  # [B] sample numbers
    pixels: Tensor  # [B, C, H, W] uint8, on the device
    partners: np.ndarray | None = None  # [B] sample numbers: of a policy that mixes two views
    weights: Tensor | None = None  # [B] float32, on the device: the share of the sample itself


@dataclass(frozen=True)
class _Request:
    """What it takes to make one batch of a view."""

    samples: np.ndarray  # [B]
    mixing: MixPlan | None

    @property
    def everyone(self) -> np.ndarray:
        """[B] or [2 B]: the samples, and their partners."""
        if self.mixing is None:
            return self.samples
        return np.concatenate([self.samples, self.mixing.partners])

    def batch(self, pixels: Tensor) -> Batch:
        """Args: pixels: [B or 2 B, C, S, S] uint8, everyone's unmixed views."""
        if self.mixing is None:
            return Batch(self.samples, pixels)
        own, others = pixels.tensor_split(2)
        weights = to_device(self.mixing.weights, pixels.device)
        mixed = apply_mix(own, others, self.mixing)
        return Batch(self.samples, mixed, self.mixing.partners, weights)


def make_view(
    images: Tensor,
    policy: ViewPolicy,
    seed: int,
    view: int,
    samples: np.ndarray,
    device: torch.device | str = "cpu",
) -> Batch:
    """One view of some samples, mixed with their partners' views where the policy mixes.

    Args:
        images: [N, C, S, S] uint8, all of the split's, on the device or on the host.
        samples: [B] sample numbers.
    """
    plan = plan_mix(policy, seed, view, samples, len(images), images.shape[-1])
    request = _Request(samples, plan)
    chosen = images[to_device(request.everyone, images.device)]
    if chosen.device.type != torch.device(device).type:  # `cuda` and `cuda:0` are not equal
        chosen = chosen.pin_memory().to(device, non_blocking=True)
    return request.batch(apply_views(chosen, policy, seed, view, request.everyone))


def open_views(
    split: AnySplit,
    policy: ViewPolicy,
    seed: int,
    device: torch.device,
    *,
    num_workers: int | None = None,
) -> "Views | EncodedViews":
    """Every view of a split, of the size that the split's dataset is at.

    Args:
        num_workers: processes that decode encoded images; None: `default_workers()`. Unused for
            pixels.
    """
    if isinstance(split, EncodedSplit):
        workers = default_workers() if num_workers is None else num_workers
        return EncodedViews(split, policy, seed, device, workers)
    return Views(split, policy, seed, device)


def default_workers() -> int:
    """This process's share of the cores, beside the others that torchrun started here."""
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class Views:
    """Every view of a split whose images are of the views' size and lie in memory: the device's,
    where at most half of what is free there holds them, and else the host's."""

    def __init__(self, split: Split, policy: ViewPolicy, seed: int, device: torch.device):
        images = torch.from_numpy(split.images)
        self._images = images.to(device) if _fits(images, device) else images
        self._policy, self._seed, self._device = policy, seed, device

    def batches(self, view: int, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        """One view of the samples of each batch, in this order."""
        for samples in order:
            yield make_view(self._images, self._policy, self._seed, view, samples, self._device)


def _fits(images: Tensor, device: torch.device) -> bool:
    return device.type != "cuda" or 2 * images.nbytes <= torch.cuda.mem_get_info(device)[0]


class EncodedViews:
    """Every view of a split of encoded images, decoded ahead by worker processes.

    What a view shows of its image is decided before the image is decoded, and cut out of it then,
    mirrored where a resized crop is; the rest is done on whole batches, on the device.
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
        """One view of the samples of each batch, in this order.

        Raises:
            UserError: an image can no longer be decoded, or a worker has ended.
        """
        count, side = len(self._split), self._split.image_size
        requests = [
            _Request(s, plan_mix(self._policy, self._seed, view, s, count, side)) for s in order
        ]
        decoded = self._decoded(view, [request.everyone for request in requests])
        for request, pixels in zip(requests, decoded, strict=True):
            yield request.batch(self._finished(pixels, view, request.everyone))

    def _finished(self, decoded: Tensor, view: int, samples: np.ndarray) -> Tensor:
        """[B, C, S, S] uint8: all of an unmixed view that was not done while decoding."""
        rest = photometry if self._policy.geometry == RESIZED_CROP else apply_views
        return rest(decoded, self._policy, self._seed, view, samples)

    def _decoded(self, view: int, order: Sequence[np.ndarray]) -> Iterator[Tensor]:
        """The decoded part of each sample's image: [B, C, S, S] uint8, on the device."""
        loader = DataLoader(
            _Decoder(self._split, self._policy, self._seed, view),
            batch_sampler=order,
            num_workers=min(self._num_workers, len(order)) if len(order) > 1 else 0,
            collate_fn=_as_it_is,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # else each pass would draw from the global one
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
    """One view's decoded pixels, for a worker process: indexed with a batch's sample numbers."""

    split: EncodedSplit
    policy: ViewPolicy
    seed: int
    view: int

    def __getitems__(self, samples: np.ndarray) -> Tensor | UserError:
        """[B, C, S, S] uint8; or what is wrong, for the parent to raise without a traceback."""
        split, side = self.split, self.split.image_size
        sizes = split.sizes[samples].astype(np.int64)  # [B, 2]
        parts, flipped = clean_boxes(sizes, side), np.zeros(len(samples), bool)
        if self.policy.geometry == RESIZED_CROP:
            parts = crop_boxes(self.policy, self.seed, self.view, samples, sizes)
            flipped = flips(self.policy, self.seed, self.view, samples)
        pixels = np.empty((len(samples), split.channels, side, side), np.uint8)
        for row, sample in enumerate(samples.tolist()):
            content = split.content(sample)
            try:
                shown = decode_view(content, sizes[row], parts[row], side, split.channels)
            except UNREADABLE as error:
                return UserError(
                    f"`{encoded_path(split.directory, split.name)}` has an image that cannot be "
                    f"decoded, sample {sample} ({error}); expected it as `prepare` wrote it. "
                    f"Remove `{split.directory}` and run `{AGAIN}`."
                )
            pixels[row] = shown[:, :, ::-1] if flipped[row] else shown
        return torch.from_numpy(pixels)


def _as_it_is(batch: Tensor | UserError) -> Tensor | UserError:
    return batch
