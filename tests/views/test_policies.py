"""Policies that resize, change colours and mix: exact, the same everywhere, and their texts."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import foreign_views
import numpy as np
import policy_views
import pytest
import torch
from conftest import change_params, opened, run_stage
from import_closure import ROOT
from PIL import Image
from policy_views import TEXTS, images, views
from scipy import stats

from pipeline.commands import store
from pipeline.runtime.derived_random import permutation
from pipeline.runtime.errors import UserError
from pipeline.store.reading.index import read_index
from pipeline.views import geometry, loader, rand_augment
from pipeline.views.geometry import crop_boxes, flips, view_entries
from pipeline.views.loader import make_views
from pipeline.views.mixing import MixPlan, apply_mix, plan_mix
from pipeline.views.policy import POLICIES, ViewPolicy
from pipeline.views.rand_augment import OPERATIONS, AugmentPlan
from pipeline.views.resampling import resize_boxes

STORE = Path("data/soft_targets")
RRC = "random_resized_crop"
CPU = torch.device("cpu")

# --- the same everywhere


@pytest.mark.parametrize(
    ("text", "channels", "view"),
    [
        *((text, 3, 1) for text in TEXTS),
        *((text, 1, 1) for text in TEXTS if "rand_augment" in text),  # colours differ
        *((text, 3, view) for text in ("crop", "crop_flip") for view in (0, 163)),  # other cycles
    ],
)
def test_views_are_the_pixels_of_their_definition_and_the_images_stay(text, channels, view):
    everything = images(channels, 12, 14)
    seed, policy = 3 + view, ViewPolicy.parse(text)
    (batch,) = make_views(everything, policy, seed, view, [np.arange(14)], CPU)
    pixels = batch.pixels.numpy()
    for sample in range(14):
        expected = foreign_views.view_of(everything.numpy(), text, seed, view, sample)
        assert np.array_equal(pixels[sample], expected), sample
    assert torch.equal(everything, images(channels, 12, 14))


@pytest.mark.parametrize("text", TEXTS)
def test_views_are_identical_for_any_batch_size_and_order(text):
    whole = views(text, np.arange(40))
    for batch_size in (1, 7):
        order = permutation(40, batch_size)
        for start in range(0, 40, batch_size):
            samples = order[start : start + batch_size]
            part = views(text, samples)
            assert torch.equal(part.pixels, whole.pixels[samples])
            if whole.partners is not None:
                assert np.array_equal(part.partners, whole.partners[samples])
                assert torch.equal(part.weights, whole.weights[samples])


@pytest.mark.parametrize("text", TEXTS)
def test_views_are_identical_however_many_batches_are_planned_at_once(text, monkeypatch):
    order = np.split(permutation(40, 0), [7, 7, 8, 30])  # one is empty

    def made() -> list[np.ndarray]:
        batches = list(make_views(images(), ViewPolicy.parse(text), 3, 1, order, CPU))
        assert all(map(np.array_equal, [batch.samples for batch in batches], order))
        return [batch.pixels.numpy() for batch in batches]

    at_once = made()
    monkeypatch.setattr(loader, "_PLANNED", 1)
    assert all(map(np.array_equal, made(), at_once))
    assert np.array_equal(at_once[3], views(text, order[3]).pixels)


def test_views_are_those_of_the_stores_written_before_with_any_threads_and_precision():
    """An edit that changes these digests invalidates every store of such a policy."""
    result = subprocess.run(
        [sys.executable, policy_views.__file__],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == GOLDEN


GOLDEN = {
    "none": "a0751aa084684af7",
    "crop": "c7655a2c99753915",
    "crop_flip": "4b7dcdedd079f072",
    "random_resized_crop": "5db4b3457cbc10da",
    "none+rand_augment(3,30)": "84f60f573d11d1ce",
    "random_resized_crop+rand_augment(2,9)": "fae51e31702982fc",
    "none+mixup(1.0)": "c933a3bdc69acd76",
    "crop+cutmix(1.0)": "ad8753c320d743f7",
    "random_resized_crop+rand_augment(2,9)+mixup(0.2)": "598609aceb9085fe",
    "random_resized_crop+rand_augment(1,15)+cutmix(0.5)": "b2158a00df45a3d3",
}


# --- texts


def test_a_policys_text_is_parsed_to_the_same_policy_and_other_texts_are_refused():
    assert [str(ViewPolicy.parse(text)) for text in TEXTS] == TEXTS
    for text in ("flip", "crop+", "crop+rand_augment(2,09)", "crop+mixup(1.0)+rand_augment(2,9)"):
        with pytest.raises(ValueError, match="is no view policy"):
            ViewPolicy.parse(text)


# --- crop and crop_flip


@pytest.mark.parametrize("policy", [name for name, count in POLICIES.items() if count])
def test_every_cycle_visits_each_distinct_view_of_each_sample_exactly_once(policy):
    distinct, samples = POLICIES[policy], np.array([0, 1, 17, 49_999, 1_281_166])
    entries = [view_entries(policy, 11, view, samples) for view in range(2 * distinct)]
    for cycle in (entries[:distinct], entries[distinct:]):
        assert (np.sort(cycle, 0) == np.arange(distinct)[:, None]).all()


def test_entries_are_uniform_and_independent_of_one_another():
    samples = np.arange(162 * 200)
    first, second = (view_entries("crop_flip", 0, view, samples) for view in (0, 1))
    for values, cells in ((first, 162), ((second - first) % 162 - 1, 161)):
        counts = np.bincount(values, minlength=cells)
        expected = len(samples) / cells
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < cells + 5 * np.sqrt(2 * cells)


def test_crops_one_by_one_equal_crops_at_once():
    rng = np.random.default_rng(0)
    padded = torch.from_numpy(rng.integers(0, 256, (40, 3, 24, 20), np.uint8))
    places = torch.from_numpy(rng.integers(0, [9, 9, 2], (40, 3)))
    one_by_one = geometry._windows_one_by_one(padded, places)
    assert torch.equal(one_by_one, geometry._windows_at_once(padded, places))
    assert one_by_one.shape == (40, 3, 16, 12)


# --- random_resized_crop

SAMPLES = np.arange(20_000)


def many_boxes(height: int, width: int) -> np.ndarray:
    sizes = np.tile([height, width], (len(SAMPLES), 1))
    return crop_boxes(0, 0, SAMPLES, sizes)


def test_boxes_and_mirroring_have_the_distribution_of_torchvision():
    from torchvision.transforms import RandomResizedCrop  # noqa: PLC0415

    torch.manual_seed(0)
    size, count = (60, 100), 4000
    image = torch.empty(3, *size)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(count)]
    )
    ours = many_boxes(*size)

    def measured(boxes: np.ndarray) -> dict[str, np.ndarray]:
        top, left, height, width = boxes.T.astype(float)
        return {
            "area": height * width,
            "ratio": width / height,
            "top": top / np.maximum(1, size[0] - height),
            "left": left / np.maximum(1, size[1] - width),
        }

    for name, values in measured(ours).items():
        distance = stats.ks_2samp(values, measured(theirs)[name]).statistic
        assert distance < 1.95 * math.sqrt(1 / count + 1 / len(ours)), name  # p = 0.001
    assert abs(flips(0, 0, SAMPLES).mean() - 0.5) < 4 * 0.5 / math.sqrt(len(SAMPLES))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((10, 1000), [0, 493, 10, 13]), ((1000, 10), [493, 0, 13, 10]), ((1, 1), [0, 0, 1, 1])],
)
def test_if_no_box_fits_the_middle_of_the_image_is_taken(size, expected):
    boxes, counts = np.unique(many_boxes(*size), axis=0, return_counts=True)
    assert expected in boxes.tolist()
    assert counts[boxes.tolist().index(expected)] > len(SAMPLES) / 4


def test_boxes_are_inside_images_of_many_sizes():
    sizes = np.stack([1 + SAMPLES % 97, 1 + SAMPLES % 89], 1)
    boxes = crop_boxes(0, 0, SAMPLES, sizes)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] > 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()


def smooth_and_noisy(height: int, width: int) -> torch.Tensor:
    y, x = np.mgrid[:height, :width]
    smooth = 127 + 120 * np.sin(y[None] / 5 + np.arange(3)[:, None, None]) * np.cos(x / 7)
    noise = np.random.default_rng(0).integers(0, 256, (3, height, width))
    return torch.from_numpy(np.stack([smooth, noise]).astype(np.uint8))


@pytest.mark.parametrize("size", [8, 150])  # shrinks to a sixth, enlarges 15-fold
def test_resizing_equals_pillows_within_one_level(size):
    pair = smooth_and_noisy(61, 61)
    cut = crop_boxes(1, 0, np.arange(30), np.full((30, 2), 61))
    cut[:4] = [0, 0, 51, 61], [0, 0, 10, 10], [41, 51, 10, 10], [20, 30, 1, 1]
    everything = pair.repeat(15, 1, 1, 1)
    ours = (
        resize_boxes(everything, torch.from_numpy(cut), torch.zeros(30, dtype=bool), size)
        .numpy()
        .astype(int)
    )
    theirs = np.empty_like(ours)
    for number, (top, left, height, width) in enumerate(cut.tolist()):
        picture = Image.fromarray(everything[number].permute(1, 2, 0).numpy())
        box = (left, top, left + width, top + height)
        resized = picture.resize((size, size), Image.Resampling.BILINEAR, box)
        theirs[number] = np.array(resized).transpose(2, 0, 1)
    difference = np.abs(ours - theirs)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02


def test_a_box_of_the_whole_image_at_its_own_size_is_the_image():
    everything = images()
    cut = torch.tensor([[0, 0, 16, 16]]).expand(40, -1)
    for mirrored, expected in ((False, everything), (True, everything.flip(3))):
        found = resize_boxes(everything, cut, torch.tensor([mirrored]).expand(40), 16)
        assert torch.equal(found, expected)


# --- RandAugment


def augmented(pictures: torch.Tensor, operations, signs, magnitude: int) -> torch.Tensor:
    chosen = np.array(operations), np.array(signs)
    planned = rand_augment.plan(*chosen, [len(pictures)], magnitude, pictures.shape[-1])
    moves, numbers, (counts,) = planned
    plan = AugmentPlan(
        magnitude, torch.from_numpy(moves), torch.from_numpy(numbers), counts.tolist()
    )
    return rand_augment.apply(pictures, plan)


def torchvisions(name: str, image: torch.Tensor, sign: int, bin_: int) -> torch.Tensor:
    """Apply the operation as transforms.RandAugment does."""
    from torchvision.transforms.v2 import functional as F  # noqa: PLC0415

    height, width = image.shape[-2:]

    def strength(most: float) -> float:
        return sign * float(torch.linspace(0, most, 31)[bin_])

    def affine(translate=(0, 0), shear=(0.0, 0.0), center=None) -> torch.Tensor:
        return F.affine(image, 0.0, list(translate), 1.0, list(shear), center=center)

    def shear() -> float:
        return math.degrees(math.atan(strength(0.3)))

    return {
        "identity": lambda: image,
        "shear_x": lambda: affine(shear=(shear(), 0.0), center=[0, 0]),
        "shear_y": lambda: affine(shear=(0.0, shear()), center=[0, 0]),
        "translate_x": lambda: affine((int(strength(150 / 331 * width)), 0)),
        "translate_y": lambda: affine((0, int(strength(150 / 331 * height)))),
        "rotate": lambda: F.rotate(image, strength(30)),
        "brightness": lambda: F.adjust_brightness(image, 1 + strength(0.9)),
        "color": lambda: F.adjust_saturation(image, 1 + strength(0.9)),
        "contrast": lambda: F.adjust_contrast(image, 1 + strength(0.9)),
        "sharpness": lambda: F.adjust_sharpness(image, 1 + strength(0.9)),
        "posterize": lambda: F.posterize(image, 8 - round(bin_ / 7.5)),
        "solarize": lambda: F.solarize(image, 255 * float(torch.linspace(1, 0, 31)[bin_])),
        "auto_contrast": lambda: F.autocontrast(image),
        "equalize": lambda: F.equalize(image),
    }[name]()


MOVES = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
EQUAL = (*MOVES, "identity", "posterize", "solarize", "equalize")


@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_equals_torchvisions(name, magnitude):
    pictures = torch.cat([images(3, 33, 10), smooth_and_noisy(33, 33), images(3, 33, 1) * 0 + 70])
    number, count = list(OPERATIONS).index(name), len(pictures)
    for sign in (1, -1):
        ours = augmented(pictures, [[number] * count], [[sign] * count], magnitude)
        theirs = torch.stack([torchvisions(name, image, sign, magnitude) for image in pictures])
        difference = (ours.int() - theirs.int()).abs()
        if name in MOVES:  # half-way between two pixels, as at 30 degrees: either one
            assert (difference > 0).float().mean() < (0.02 if magnitude == 30 else 0.001)
        else:
            assert difference.max() <= (0 if name in EQUAL else 1)


# --- mixing


def test_mixup_is_the_rounded_weighted_mean():
    pixels = torch.tensor([0, 10, 255, 255], dtype=torch.uint8).reshape(1, 1, 2, 2)
    partner = torch.tensor([255, 20, 0, 255], dtype=torch.uint8).reshape(1, 1, 2, 2)
    quarter = apply_mix(pixels, partner, torch.tensor([0.25]), None)
    assert quarter.flatten().tolist() == [191, 18, 64, 255]  # 191.25, 17.5, 63.75, 255
    for share, expected in ((1.0, pixels), (0.0, partner)):
        assert torch.equal(apply_mix(pixels, partner, torch.tensor([share]), None), expected)


def plan(text: str, samples: np.ndarray = SAMPLES, size: int = 32) -> MixPlan:
    return plan_mix(ViewPolicy.parse(text), 5, 2, samples, len(SAMPLES), size)


@pytest.mark.parametrize("text", ["none+mixup(0.3)", "none+cutmix(1.0)"])
def test_a_mix_plan_follows_its_definition(text):
    mixing = plan(text, np.arange(300))
    shares = [foreign_views.label_share(text, 32, 5, 2, sample) for sample in range(300)]
    np.testing.assert_array_equal(mixing.weights, np.float32(shares))


def test_a_partner_is_any_other_sample_and_a_single_sample_its_own():
    partners = plan("none+mixup(1.0)").partners
    offsets = (partners - SAMPLES) % len(SAMPLES)
    assert offsets.min() > 0  # never itself
    distance = stats.kstest(offsets / len(SAMPLES), "uniform").statistic
    assert distance < 1.95 / math.sqrt(len(SAMPLES))
    # A sample is the partner of one other on average, and of none with probability 1/e.
    chosen = np.bincount(partners, minlength=len(SAMPLES))
    assert abs((chosen == 0).mean() - math.exp(-1)) < 0.02
    for count, expected in ((2, [1, 0]), (1, [0])):
        mixing = plan_mix(ViewPolicy.parse("none+mixup(1.0)"), 0, 0, np.arange(count), count, 8)
        assert mixing.partners.tolist() == expected


@pytest.mark.parametrize("alpha", [0.2, 3.0])
def test_the_weights_of_mixup_follow_the_beta_distribution(alpha):
    weights = plan(f"none+mixup({alpha})").weights.astype(float)
    assert (weights * 256 == (weights * 256).round()).all()
    edges = np.arange(257) / 256  # shares up to edge + 1 / 512 round to the edge or below
    expected = stats.beta.cdf(edges + 1 / 512, alpha, alpha)
    observed = np.searchsorted(np.sort(weights), edges, side="right") / len(weights)
    assert np.abs(observed - expected).max() < 1.95 / math.sqrt(len(weights))


def test_cutmix_boxes_have_the_distribution_of_the_paper():
    """Compared with the authors' procedure on a random generator."""
    alpha = 0.5
    rng, size = np.random.default_rng(0), 32
    cut = np.sqrt(1 - rng.beta(alpha, alpha, len(SAMPLES)))
    centres = rng.integers(0, size, (2, len(SAMPLES)))
    half = (size * cut).astype(int) // 2
    sides = np.clip(centres + half, 0, size) - np.clip(centres - half, 0, size)
    shares = 1 - sides.prod(0) / size**2
    mixing = plan(f"none+cutmix({alpha})")
    assert stats.ks_2samp(mixing.weights, shares).statistic < 1.95 * math.sqrt(2 / len(SAMPLES))
    top, left, bottom, right = mixing.boxes.T
    outside = 1 - (bottom - top) * (right - left) / size**2
    np.testing.assert_array_equal(mixing.weights, outside.astype(np.float32))


# --- the store

MIXUP = {
    "policy": RRC,
    "rand_augment": {"operations": 2, "magnitude": 9},
    "mix": {"method": "mixup", "alpha": 0.4},
}
CUTMIX = {"policy": "crop_flip", "mix": {"method": "cutmix", "alpha": 1.0}}


@pytest.mark.parametrize(
    ("changed", "text", "encoding"),
    [
        (MIXUP, f"{RRC}+rand_augment(2,9)+mixup(0.4)", {"encoding": "dense"}),
        (CUTMIX, "crop_flip+cutmix(1.0)", {"encoding": "top_k", "k": 2}),
    ],
)
def test_a_store_of_mixed_views_contains_the_teachers_logits_for_them(
    project, changed, text, encoding
):
    change_params("views", **changed)
    change_params("soft_targets", **encoding)
    run_stage("soft_targets")
    assert read_index().policy == text
    assert f"  views     {text}, seed 7, 16 pixels" in list(store.inspect(STORE))
    assert "108 of them match the teacher's logits" in store.verify(STORE, 108, 0)
    for stage in ("student", "baseline"):
        run_stage(stage, "small")


def test_the_canaries_detect_a_changed_partner(project):
    change_params("views", **CUTMIX)
    run_stage("soft_targets")
    path = Path("data/prepared/train_images.npy")
    pixels = np.load(path)
    policy = ViewPolicy.parse("crop_flip+cutmix(1.0)")
    canaries = np.array([0, 11, 23, 35])
    partners = plan_mix(policy, 7, 0, canaries, 36, 16).partners
    (changed,) = [p for p in partners if p not in canaries][:1]
    pixels[changed] = 255 - pixels[changed]
    np.save(path, pixels)
    with pytest.raises(UserError, match="canaries that differ: the images or the augmentation"):
        opened()
