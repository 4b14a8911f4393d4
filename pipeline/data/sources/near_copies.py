"""Find near-copies across splits: one picture at two sizes, or as two JPEG files.

Each image becomes a sketch: the low frequencies of its luma, over its contrast. Sketches of copies
are close to each other and far from all others. Among alike images, such as digits, the nearest is
close, too, but so are others: therefore few may be within four times the distance.
`python -m benchmarks.near_copies` measures how many copies are found, and how many others.
"""

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

import numpy as np
from scipy.fft import dct
from scipy.spatial import KDTree

from pipeline.data.prepared.dataset import SPLITS
from pipeline.data.prepared.image_decoding import available_cores
from pipeline.data.sources.image_reading import DecodedImage, UnreadableImage
from pipeline.data.sources.splits import SampleTable
from pipeline.runtime.derived_random import hash64

_GRID = 8  # cells each way, and frequencies
#: Vertical and horizontal frequencies of a sketch: those with a sum up to 6, without the mean.
_FREQUENCIES = [(v, h) for v in range(_GRID) for h in range(_GRID) if 0 < v + h <= 6]
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of RGB
_LEAST_CONTRAST = 4.0  # standard deviation of the cells in levels of 255; less: not compared
# Distances of sketches; 1.4 is that of images that have nothing in common.
_FARTHEST = 0.1  # more is no copy; a search for less is faster
_COPY = 0.02  # up to this: a copy, however many others are as near
_RATIO = 0.25  # between: a copy if few points are within its distance over this
_NEIGHBOURS = 5  # more are not few
_ROWS = 2**18  # sketches in a tree: 60 MB
_SHOWN = 5  # pairs


class Sketches:
    """Takes a sketch of each image while the images pass."""

    def __init__(self, count: int):
        self._rows = np.full((count, len(_FREQUENCIES)), np.nan, np.float16)
        self._passed = np.zeros(count, bool)

    def watch(
        self, images: Iterable[DecodedImage | UnreadableImage]
    ) -> Iterator[DecodedImage | UnreadableImage]:
        """Yield the images, and take a sketch of each that can be read."""
        for image in images:
            if isinstance(image, DecodedImage):
                self._rows[image.number] = sketch(image.pixels)
                self._passed[image.number] = True
            yield image

    @property
    def rows(self) -> np.ndarray:
        """[N, frequencies] float16, of the images that could be read, in the order of their
        numbers; not a number for images without contrast."""
        return self._rows if self._passed.all() else self._rows[self._passed]


def sketch(pixels: np.ndarray) -> np.ndarray:
    """[C, S, S] uint8 -> [frequencies], a part of a vector of norm 1; not a number: no contrast."""
    basis = _basis(pixels.shape[-1])
    spectra = (basis @ pixels.astype(np.float32) @ basis.T).reshape(len(pixels), -1)  # [C, 64]
    spectrum = _LUMA @ spectra if len(spectra) == 3 else spectra[0]
    energy = spectrum @ spectrum - spectrum[0] ** 2
    if energy < (_LEAST_CONTRAST * _GRID) ** 2:
        return np.full(len(_FREQUENCIES), np.nan)
    return spectrum[_PLACES] / energy**0.5


_PLACES = np.array([vertical * _GRID + horizontal for vertical, horizontal in _FREQUENCIES])
_BASES: dict[int, np.ndarray] = {}  # by the side of the images


def _basis(side: int) -> np.ndarray:
    """[8, side] float32: the mean of each of 8 cells, then the cosine transform (orthonormal)."""
    if side not in _BASES:
        edges = np.linspace(0, side, _GRID + 1)
        pixels = np.arange(side)
        overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
        cells = np.clip(overlap, 0, 1) * (_GRID / side)
        _BASES[side] = dct(cells, axis=0, norm="ortho").astype(np.float32)
    return _BASES[side]


def find_near_copies(
    samples: SampleTable, rows: np.ndarray, digests: np.ndarray, shown: int = _SHOWN
) -> dict[str, dict[str, Any]]:
    """Find validation and test images that are near-copies of an image of an earlier split.

    Those of equal content, which `find_duplicates` counts, are left out. Time grows less than with
    the product of the splits' sizes: a tree of each split is searched.

    Args:
        rows: of `Sketches`.
        digests: [N, 16] uint8, of each sample's content.
        shown: pairs that are returned, at most.

    Returns:
        `near_copies`: the number of such images, of those of each pair of splits, and the first
        pairs of ids; empty if there are none.
    """
    comparable = ~np.isnan(rows[:, 0])
    members = [np.flatnonzero((samples.splits == s) & comparable) for s in range(len(SPLITS))]
    points = [_distinct(rows, numbers) for numbers in members]
    contents = np.ascontiguousarray(digests).view(np.uint64)[:, 0]
    original: dict[int, int] = {}  # sample -> that of an earlier split
    counts = {}
    for earlier, later in combinations(range(len(SPLITS)), 2):
        is_equal = np.isin(contents[members[later]], contents[samples.splits == earlier])
        near, nearest = _near(rows, points[earlier], members[later][~is_equal])
        pairs = zip(near.tolist(), nearest.tolist(), strict=True)
        pairs = {sample: first for sample, first in pairs if sample not in original}
        if pairs:
            counts[f"{SPLITS[later]} in {SPLITS[earlier]}"] = len(pairs)
        original |= pairs
    if not original:
        return {}
    first = sorted((first, sample) for sample, first in original.items())[:shown]
    named = [[samples.ids[number] for number in pair] for pair in first]
    return {"near_copies": {"count": len(original), "of": counts, "first": named}}


def _distinct(rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The first of these rows with each value, ascending: a tree of many equal ones is slow."""
    words = rows[numbers].view(np.uint16).T
    return numbers[np.sort(np.unique(hash64(*words), return_index=True)[1])]


def _near(rows: np.ndarray, points: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, ...]:
    """The queries that are near-copies of a point, and that point: numbers of rows, [M] each."""
    distances, nearest = np.full(len(queries), np.inf), np.zeros(len(queries), np.int64)
    wanted = rows[queries].astype(np.float64)
    for part, tree in _trees(rows, points, queries):
        found, index = tree.query(wanted, distance_upper_bound=_FARTHEST, workers=available_cores())
        is_nearer = found < distances
        distances[is_nearer], nearest[is_nearer] = found[is_nearer], part[index[is_nearer]]
    kept = np.isfinite(distances)
    queries, wanted, distances, nearest = (
        values[kept] for values in (queries, wanted, distances, nearest)
    )
    around = np.zeros(len(queries), np.int64)  # points that are not much farther than the nearest
    radius = distances / _RATIO
    for _, tree in _trees(rows, points, queries):
        around += tree.query_ball_point(
            wanted, radius, workers=available_cores(), return_length=True
        )
    is_near = (distances <= _COPY) | (around < _NEIGHBOURS)
    return queries[is_near], nearest[is_near]


def _trees(
    rows: np.ndarray, points: np.ndarray, queries: np.ndarray
) -> Iterator[tuple[np.ndarray, KDTree]]:
    """Yield up to _ROWS points at a time with their tree; nothing if there is no query."""
    for start in range(0, len(points) if len(queries) else 0, _ROWS):
        part = points[start : start + _ROWS]
        yield part, KDTree(rows[part].astype(np.float64))
