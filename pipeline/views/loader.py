"""Views of a split's samples, batch by batch, on their device.

The teacher, its soft targets, students, measurements and canaries all get their pixels here.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, groupby, repeat, tee
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_convert

from pipeline.compute.device import fits, to_device
from pipeline.data.prepared.dataset import AGAIN, AnySplit, EncodedSplit, Split, encoded_path
from pipeline.data.prepared.image_decoding import (
    CLEAN_RATIO,
    UNREADABLE,
    available_cores,
    clean_boxes,
    decode_view,
)
from pipeline.runtime.errors import UserError, ended_worker, is_of_ended_worker
from pipeline.views.geometry import ViewPlan, apply_views, crop_boxes, flips, plan_views
from pipeline.views.mixing import apply_mix, plan_mix
from pipeline.views.policy import PairedPolicy, ViewPolicy
from pipeline.views.random_numbers import strong_seed

RESIZED_CROP = "random_resized_crop"


BATCH_SIZE = 256  # of images without augmentation


def batches_of(samples: np.ndarray, size: int = BATCH_SIZE) -> list[np.ndarray]:
    """Split sample numbers into batches, in their order."""
    return np.split(samples, range(size, len(samples), size))


@dataclass(frozen=True)
class Batch:
    samples: np.ndarray  # [B] sample numbers
    pixels: Tensor  # [B, C, H, W] uint8, on the device
    partners: Tensor | None = None  # [B] sample numbers, on the device; None: no mix
    weights: Tensor | None = None  # [B] float32, on the device: the share of the sample itself
    #: of pairs: the strong views, as `pixels`, which are the weak ones; None: no pairs
    strong_pixels: Tensor | None = None


@dataclass(frozen=True)
class _BatchPlan:
    """What makes one batch of B views; tensors on the device."""

    samples: np.ndarray  # [B] sample numbers
    needed: np.ndarray  # [B], or with their partners [2 B]: the images that the batch needs
    views: ViewPlan  # of those
    partners: Tensor | None  # [B]
    weights: Tensor | None  # [B]
    boxes: Tensor | None  # [B, 4]

    def finish(self, images: Tensor) -> Batch:
        """Make the batch of its images, [B or 2 B, C, S, S] uint8."""
        pixels = apply_views(images, self.views)
        if self.partners is not None:
            pixels = apply_mix(*pixels.tensor_split(2), self.weights, self.boxes)
        return Batch(self.samples, pixels, self.partners, self.weights)


#: Samples whose views are planned at once, up to a batch: many batches share the cost of each call
#: of NumPy, and the memory of a plan does not grow with the split.
_PLANNED = 2**15


def _plan_blocks(
    policy: ViewPolicy,
    seed: int,
    view: int,
    order: Sequence[np.ndarray],
    split: tuple[int, int],
    device: torch.device,
) -> Iterator[list[_BatchPlan]]:
    """Plan one view of the samples of each batch, many batches at once.

    Args:
        split: number of the split's samples, and side of its images in pixels.
    """
    ends = np.cumsum([len(samples) for samples in order])
    for _, numbered in groupby(zip(ends // _PLANNED, order, strict=True), key=itemgetter(0)):
        block = [samples for _, samples in numbered]
        needed, mixed = block, [repeat(None)] * 3
        mixing = plan_mix(policy, seed, view, np.concatenate(block), *split)
        if mixing is not None:
            sizes = [len(samples) for samples in block]
            partners = np.split(mixing.partners, np.cumsum(sizes)[:-1])
            needed = list(map(np.concatenate, zip(block, partners, strict=True)))
            for number, array in enumerate((mixing.partners, mixing.weights, mixing.boxes)):
                if array is not None:
                    mixed[number] = to_device(array, device).split(sizes)
        views = plan_views(policy, seed, view, needed, split[1], device)
        yield list(map(_BatchPlan, block, needed, views, *mixed))


def make_views(
    images: Tensor,
    policy: ViewPolicy,
    seed: int,
    view: int,
    order: Sequence[np.ndarray],
    device: torch.device,
) -> Iterator[Batch]:
    """Yield one view of the samples of each batch, mixed with their partners' views if the policy
    mixes. `images` are those of the whole split, [N, C, S, S] uint8, on the device or on the host.
    """
    split = len(images), images.shape[-1]
    for block in _plan_blocks(policy, seed, view, order, split, device):
        needed = [plan.needed for plan in block]
        rows = to_device(np.concatenate(needed), images.device).split(list(map(len, needed)))
        for plan, chosen in zip(block, rows, strict=True):
            pixels = images[chosen]
            if pixels.device.type != device.type:  # `cuda` and `cuda:0` are not equal
                pixels = pixels.pin_memory().to(device, non_blocking=True)
            yield plan.finish(pixels)


def open_views(
    split: AnySplit,
    policy: ViewPolicy | PairedPolicy,
    seed: int,
    device: torch.device,
    *,
    num_workers: int | None = None,
    clean: "CleanView | None" = None,
) -> "AnyViews":
    """Open the views of a split, or its pairs of views, at the image size of its dataset.

    Args:
        num_workers: processes that decode encoded images; None: `default_workers()`.
        clean: what a view of an encoded image without a resized crop shows; None: the standard.
    """
    if isinstance(policy, PairedPolicy):
        weak = open_views(split, policy.weak, seed, device, num_workers=num_workers, clean=clean)
        return PairedViews(weak, weak.by(policy.strong, strong_seed(seed)))
    if isinstance(split, EncodedSplit):
        workers = default_workers() if num_workers is None else num_workers
        return EncodedViews(split, policy, seed, device, workers, clean or CleanView())
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
        self._images = images.to(device) if fits(images.nbytes, device, parts=2) else images
        self._policy, self._seed, self._device = policy, seed, device

    def batches(self, view: int, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        """Yield one view of the samples of each batch, in this order."""
        return make_views(self._images, self._policy, self._seed, view, order, self._device)

    def by(self, policy: ViewPolicy, seed: int) -> "Views":
        """Other views of the same images, which are kept once."""
        views = copy.copy(self)
        views._policy, views._seed = policy, seed
        return views


@dataclass(frozen=True)
class CleanView:
    """The middle square of an image that its view shows, and how it is resized."""

    ratio: float = CLEAN_RATIO
    bicubic: bool = False


@dataclass(frozen=True)
class EncodedViews:
    """The views of a split of encoded images, decoded ahead by worker processes.

    Workers cut a view's box out of its image while decoding it, and mirror a resized crop. All
    other steps run on whole batches, on the device. The workers of a pass that ends decode the
    next one, too, and end with this object.
    """

    split: EncodedSplit
    policy: ViewPolicy
    seed: int
    device: torch.device
    num_workers: int
    clean: CleanView = CleanView()
    _idle: list[DataLoader] = field(default_factory=list, init=False, repr=False, compare=False)

    def batches(self, view: int, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        """Yield one view of the samples of each batch, in this order.

        Raises:
            UserError: an image can no longer be decoded, or a worker has ended.
        """
        policy, split = self.policy, (len(self.split), self.split.image_size)
        if policy.geometry == RESIZED_CROP:
            policy = replace(policy, geometry="none")  # the decoder has cut and resized
        blocks = _plan_blocks(policy, self.seed, view, order, split, self.device)
        plans, ahead = tee(chain.from_iterable(blocks))
        loader = self._loader(min(self.num_workers, len(order)) if len(order) > 1 else 0)
        loader.batch_sampler.requests = ((view, plan.needed) for plan in ahead)
        try:
            for plan, decoded in zip(plans, loader, strict=True):
                if isinstance(decoded, UserError):
                    raise decoded
                yield plan.finish(decoded.to(self.device, non_blocking=True))
        except RuntimeError as error:
            if not is_of_ended_worker(error):
                raise
            raise UserError(ended_worker(error)) from None
        if loader.num_workers:  # a pass that was left early ends its workers, with their queues
            self._idle[:] = [loader]

    def _loader(self, workers: int) -> DataLoader:
        """Take the loader of the last pass, if it has enough workers, or make one."""
        if workers and self._idle and self._idle[0].num_workers >= workers:
            return self._idle.pop()
        return DataLoader(
            _Decoder(self.split, self.policy.geometry == RESIZED_CROP, self.seed, self.clean),
            batch_sampler=_Requests(),
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=default_convert,  # a tensor and an error stay what they are
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # without it, it draws from the global generator
        )

    def by(self, policy: ViewPolicy, seed: int) -> "EncodedViews":
        """Other views of the same images."""
        return replace(self, policy=policy, seed=seed)


@dataclass(frozen=True)
class PairedViews:
    """A weak and a strong view of each sample; view number v of both is pair number v."""

    weak: "Views | EncodedViews"
    strong: "Views | EncodedViews"

    def batches(self, pair: int, order: Sequence[np.ndarray]) -> Iterator[Batch]:
        """Yield one pair of views of the samples of each batch, in this order.

        Raises:
            UserError: as `EncodedViews.batches`.
        """
        both = [views.batches(pair, order) for views in self._decoded_at_once]
        for weak, strong in zip(*both, strict=True):
            yield replace(weak, strong_pixels=strong.pixels)

    @cached_property
    def _decoded_at_once(self) -> list["Views | EncodedViews"]:
        """Both, with half the workers each; once, because workers outlive a pass."""
        return [
            replace(views, num_workers=(views.num_workers + 1) // 2)
            if isinstance(views, EncodedViews)
            else views
            for views in (self.weak, self.strong)
        ]


AnyViews = Views | EncodedViews | PairedViews


class _Requests:
    """What a DataLoader asks of its workers in one pass; the next pass has others."""

    def __init__(self) -> None:
        self.requests: Iterator[tuple[int, np.ndarray]] = iter(())  # view, and [B] sample numbers

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return self.requests


@dataclass(frozen=True)
class _Decoder:
    """The decoded pixels of a split, for worker processes: indexed with a view and a batch."""

    split: EncodedSplit
    resized_crop: bool
    seed: int
    clean: CleanView

    def __getitems__(self, request: tuple[int, np.ndarray]) -> Tensor | UserError:
        """[B, C, S, S] uint8; or an error, which the parent raises without a traceback."""
        view, samples = request
        split, seed, clean = self.split, self.seed, self.clean
        side = split.image_size
        sizes = split.sizes[samples].astype(np.int64)  # [B, 2]
        if self.resized_crop:
            boxes = crop_boxes(seed, view, samples, sizes)
            flipped = flips(seed, view, samples)
        else:
            boxes = clean_boxes(sizes, side, clean.ratio)
            flipped = np.zeros(len(samples), bool)
        pixels = np.empty((len(samples), split.channels, side, side), np.uint8)
        for row, sample in enumerate(samples.tolist()):
            content = split.content(sample)
            try:
                decoded = decode_view(
                    content, sizes[row], boxes[row], side, split.channels, bicubic=clean.bicubic
                )
            except UNREADABLE as error:
                return UserError(
                    f"`{encoded_path(split.directory, split.name)}` has an image that cannot be "
                    f"decoded, sample {sample} ({error}); expected it as `prepare` wrote it. "
                    f"Remove `{split.directory}` and run `{AGAIN}`."
                )
            pixels[row] = decoded[:, :, ::-1] if flipped[row] else decoded
        return torch.from_numpy(pixels)
