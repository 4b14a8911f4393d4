"""Warnings and refusals about pixels: their number, the bits that deep images use, and missing
contrast."""

from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from pipeline.data.prepared.deep_images import FEW_BITS
from pipeline.data.sources.image_reading import DecodedImage, UnreadableImage
from pipeline.data.sources.params import DatasetParams
from pipeline.runtime.errors import UserError

_SHOWN = 5  # names
_NEAR_BLACK = 0.01  # mean of pixels in [0, 1]
_DARK_WHITE = 32  # of 255: the brightest pixel of all
_REDUCED = 2  # times: a side that is reduced so much loses detail that the user may want


class PixelRanges:
    """Looks at the values of all images while they pass: how many bits are used, and contrast."""

    def __init__(self, params: DatasetParams, ids: Sequence[str]):
        self._params, self._ids = params, ids
        self._images = self._deep = self._deep_and_dark = 0
        self._largest, self._largest_at = 0, 0  # value of the deep images, and its sample
        self._flat: list[int] = []  # samples whose pixels are all equal
        self._black = 0  # of these
        self._paged: list[int] = []  # samples whose files have pages that are not read
        self._brightest = 0  # of all pixels
        self._sides: list[int] = []  # pixels, the shorter one of each image in the source

    def watch(
        self, images: Iterable[DecodedImage | UnreadableImage]
    ) -> Iterator[DecodedImage | UnreadableImage]:
        """Yield the images, and look at each.

        Raises:
            UserError: after the last one: deep images use 12 bits or fewer and `bit_depth` is not
                set, or most images have no contrast.
        """
        for image in images:
            if isinstance(image, DecodedImage):
                self._add(image)
            yield image
        self._check()

    def _add(self, image: DecodedImage) -> None:
        self._images += 1
        self._sides.append(image.side)
        if image.largest is not None:
            self._deep += 1
            self._deep_and_dark += image.largest < 2**FEW_BITS
            if image.largest > self._largest:
                self._largest, self._largest_at = image.largest, image.number
        planes = image.pixels.reshape(len(image.pixels), -1)
        darkest, brightest = planes.min(1), planes.max(1)
        self._brightest = max(self._brightest, int(brightest.max()))
        if image.more_pages:
            self._paged.append(image.number)
        if (darkest == brightest).all():
            self._flat.append(image.number)
            self._black += not darkest.any()

    def _check(self) -> None:
        root, bits = self._params.root, self._bits()
        if self._params.bit_depth is None and 0 < self._largest < 2**FEW_BITS:
            raise UserError(
                f"`{root}` (`dataset.root`): in its images of more than 8 bits a channel "
                f"({self._deep:,} of {self._images:,}), the largest value is {self._largest:,} "
                f"(`{self._ids[self._largest_at]}`): {bits} of 16 bits are used. With white at "
                "65,535 they would be near black. Write how many bits white has, such as "
                f"`dataset.bit_depth: {bits}`; or 16, if the images are so dark."
            )
        if 2 * len(self._flat) > self._images:
            raise UserError(
                f"`{root}` (`dataset.root`): {len(self._flat):,} of its {self._images:,} images "
                f"have one colour in all pixels, {self._black:,} of them black, such as "
                f"{self._named(self._flat)}. Expected pictures; look at some of the files."
            )

    def _bits(self) -> int:
        return max(8, self._largest.bit_length())

    def _named(self, numbers: Sequence[int]) -> str:
        return ", ".join(f"`{self._ids[number]}`" for number in sorted(numbers)[:_SHOWN])

    def findings(self, mean: Sequence[float]) -> Iterator[str]:
        """Yield a line for each thing that the user should know about the pixels.

        Args:
            mean: [C], of the training pixels in [0, 1].
        """
        side, kept = median(self._sides), self._params.image_size
        if self._params.storage == "pixels" and side >= _REDUCED * kept:
            yield (
                f"warning: images are reduced to {kept} pixels a side (`dataset.image_size`); the "
                f"median of their shorter sides is {side:g}. Set a larger size if that loses what "
                "tells the classes apart; docs/images.md says how to keep photographs"
            )
        if self._deep and self._params.bit_depth is None and 0 < self._largest < 2**15:
            yield (
                f"warning: in the images of more than 8 bits a channel ({self._deep:,} of "
                f"{self._images:,}), the largest value is {self._largest:,}, "
                f"{self._largest / 65_535:.0%} of white (65,535); if {self._bits()} bits are used, "
                f"set `dataset.bit_depth: {self._bits()}`"
            )
        if self._params.bit_depth is None and 2 * self._deep_and_dark > self._deep:
            yield (
                f"warning: of {self._deep:,} images of more than 8 bits a channel, "
                f"{self._deep_and_dark:,} have no value above {2**FEW_BITS - 1:,}, but the largest "
                f"of all is {self._largest:,}: are {FEW_BITS} bits used, and some pixels wrong?"
            )
        if self._flat:
            yield (
                f"warning: images with one colour in all pixels: {len(self._flat):,} of "
                f"{self._images:,}, of which black {self._black:,}, such as "
                f"{self._named(self._flat)}"
            )
        if self._paged:
            yield (
                f"warning: files with several pages, of which the first is read: "
                f"{len(self._paged):,} of {self._images:,}, such as {self._named(self._paged)}"
            )
        if max(mean) < _NEAR_BLACK or self._brightest < _DARK_WHITE:
            yield (
                f"warning: the images are near black: the mean of their pixels is "
                f"{max(mean):.2%} of white, and the largest is {self._brightest} of 255"
            )
