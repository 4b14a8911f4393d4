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
import yaml
from conftest import bytes_of, change_params, opened, run_stage
from import_closure import ROOT
from PIL import Image
from policy_views import TEXTS, digests, images, views
from scipy import stats

from pipeline.commands import store
from pipeline.runtime.derived_random import permutation
from pipeline.runtime.errors import UserError
from pipeline.runtime.outputs import TEACHER
from pipeline.store.reading.index import read_index
from pipeline.views.geometry import crop_boxes, flips
from pipeline.views.loader import make_view
from pipeline.views.mixing import MixPlan, apply_mix, plan_mix
from pipeline.views.policy import ViewPolicy
from pipeline.views.rand_augment import OPERATIONS, apply
from pipeline.views.resampling import ONE, resize_boxes, taps

STORE = Path("data/soft_targets")
RRC = "random_resized_crop"

# --- the same everywhere


@pytest.mark.parametrize(
    ("text", "channels"),  # one channel for the steps that do not treat each alike
    [*((text, 3) for text in TEXTS), *((text, 1) for text in TEXTS if "rand_augment" in text)],
)
def test_views_are_the_pixels_of_their_definition_and_the_images_stay(text, channels):
    everything = images(channels, 12, 14)
    pixels = views(text, np.arange(14), everything).pixels.numpy()
    for sample in range(14):
        expected = foreign_views.view_of(everything.numpy(), text, 3, 1, sample)
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


def test_views_are_identical_in_another_process_with_other_threads():
    result = subprocess.run(
        [sys.executable, policy_views.__file__],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == digests()


def test_views_are_those_of_the_stores_written_before():
    """An edit that changes these digests invalidates every store of such a policy."""
    assert digests() == GOLDEN


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


def test_views_do_not_depend_on_the_precision_of_networks():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert digests() == GOLDEN
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("changed", [{"seed": 4}, {"view": 2}, {"policy": "crop"}])
def test_another_seed_view_or_policy_gives_other_views(changed):
    for text in TEXTS[2:]:
        key = {"policy": text, "seed": 3, "view": 1} | changed
        policy = ViewPolicy.parse(key["policy"])
        other = make_view(images(), policy, key["seed"], key["view"], np.arange(40))
        same = (other.pixels == views(text, np.arange(40)).pixels).flatten(1).all(1)
        assert same.float().mean() < 0.5, text  # the images of few levels may look alike


# --- texts


def test_a_policys_text_is_parsed_to_the_same_policy():
    assert [str(ViewPolicy.parse(text)) for text in TEXTS] == TEXTS


@pytest.mark.parametrize(
    "text",
    [
        *("", "flip", "crop+", "crop ", "crop+rand_augment", "crop+mixup(1)", "crop+mixup(1.0.0)"),
        *("crop+rand_augment(2,09)", "crop+mixup(1.0)+rand_augment(2,9)"),
    ],
)
def test_text_of_no_policy_is_refused(text):
    with pytest.raises(ValueError, match="is no view policy"):
        ViewPolicy.parse(text)


def test_only_geometries_alone_have_finitely_many_views():
    counts = {text: ViewPolicy.parse(text).distinct for text in TEXTS}
    assert {k: v for k, v in counts.items() if v} == {"none": 1, "crop": 81, "crop_flip": 162}


# --- random_resized_crop

SAMPLES = np.arange(20_000)


def many_boxes(height: int, width: int) -> np.ndarray:
    sizes = np.tile([height, width], (len(SAMPLES), 1))
    return crop_boxes(ViewPolicy(RRC), 0, 0, SAMPLES, sizes)


@pytest.mark.parametrize("size", [(60, 100), (32, 32)])
def test_boxes_have_the_distribution_of_torchvision(size):
    from torchvision.transforms import RandomResizedCrop  # noqa: PLC0415

    torch.manual_seed(0)
    image = torch.empty(3, *size)
    count = 4000
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
    boxes = crop_boxes(ViewPolicy(RRC), 0, 0, SAMPLES, sizes)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] > 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()
    alone = crop_boxes(ViewPolicy(RRC), 0, 0, SAMPLES[1234:1235], sizes[1234:1235])
    assert np.array_equal(alone[0], boxes[1234])


def test_half_of_the_views_are_mirrored():
    flags = flips(ViewPolicy(RRC), 0, 0, SAMPLES)
    assert abs(flags.mean() - 0.5) < 4 * 0.5 / math.sqrt(len(SAMPLES))


def smooth_and_noisy(height: int, width: int) -> torch.Tensor:
    y, x = np.mgrid[:height, :width]
    smooth = 127 + 120 * np.sin(y[None] / 5 + np.arange(3)[:, None, None]) * np.cos(x / 7)
    noise = np.random.default_rng(0).integers(0, 256, (3, height, width))
    return torch.from_numpy(np.stack([smooth, noise]).astype(np.uint8))


@pytest.mark.parametrize("size", [8, 33, 150])  # shrinks to a sixth, enlarges 15-fold
def test_resizing_equals_pillows_within_one_level(size):
    pair = smooth_and_noisy(51, 67)
    cut = crop_boxes(ViewPolicy(RRC), 1, 0, np.arange(30), np.tile([51, 67], (30, 1)))
    cut[:4] = [0, 0, 51, 67], [0, 0, 10, 10], [41, 57, 10, 10], [20, 30, 1, 1]
    everything = pair.repeat(15, 1, 1, 1)
    ours = resize_boxes(everything, cut, np.zeros(30, bool), size).numpy().astype(int)
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
    cut = np.tile([0, 0, 16, 16], (40, 1))
    assert torch.equal(resize_boxes(everything, cut, np.zeros(40, bool), 16), everything)
    assert torch.equal(resize_boxes(everything, cut, np.ones(40, bool), 16), everything.flip(3))


def test_weights_of_resizing_sum_to_one_exactly():
    starts, lengths = np.array([0, 3, 900]), np.array([1000, 7, 100])
    positions, weights = taps(starts, lengths, 24, 1000)
    units = weights.astype(float) * ONE
    assert (units == units.round()).all()
    assert (units >= 0).all()
    assert (units.sum(-1) == ONE).all()
    assert positions.min() >= 0
    assert positions.max() < 1000


# --- RandAugment


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
        ours = apply(pictures, np.full(count, number), np.full(count, sign), magnitude)
        theirs = torch.stack([torchvisions(name, image, sign, magnitude) for image in pictures])
        difference = (ours.int() - theirs.int()).abs()
        if name in MOVES:  # half-way between two pixels, as at 30 degrees: either one
            assert (difference > 0).float().mean() < (0.02 if magnitude == 30 else 0.001)
        else:
            assert difference.max() <= (0 if name in EQUAL else 1)


def test_an_operation_on_a_grey_image_equals_that_on_equal_channels():
    grey, signs = images(1, 17, 9), np.array([1, -1, 1] * 3)
    for number, name in enumerate(OPERATIONS):
        numbers = np.full(9, number)
        expected = apply(grey.expand(-1, 3, -1, -1).contiguous(), numbers, signs, 13)
        found = apply(grey, numbers, signs, 13).expand(-1, 3, -1, -1)
        assert torch.equal(found, expected), name


def test_all_operations_are_equally_frequent_in_both_directions(monkeypatch):
    seen = []

    def watched(pixels, operations, signs, magnitude):
        seen.append(operations * 2 + (signs > 0))
        return pixels

    monkeypatch.setattr("pipeline.views.rand_augment.apply", watched)
    everything = torch.zeros(1, 1, 8, 8, dtype=torch.uint8).expand(14_000, -1, -1, -1)
    make_view(everything, ViewPolicy.parse("none+rand_augment(2,9)"), 0, 0, np.arange(14_000))
    first, second = seen
    for values, cells in ((first, 28), (second, 28), (first // 2 * 14 + second // 2, 196)):
        counts = np.bincount(values, minlength=cells)
        expected = len(values) / cells
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < cells + 5 * math.sqrt(2 * cells)


# --- mixing


def test_mixup_is_the_rounded_weighted_mean():
    pixels = torch.tensor([0, 10, 255, 255], dtype=torch.uint8).reshape(1, 1, 2, 2)
    partner = torch.tensor([255, 20, 0, 255], dtype=torch.uint8).reshape(1, 1, 2, 2)
    quarter = MixPlan(np.array([1]), np.array([0.25], np.float32), None)
    # 191.25, 17.5, 63.75, 255
    assert apply_mix(pixels, partner, quarter).flatten().tolist() == [191, 18, 64, 255]
    for share, expected in ((1, pixels), (0, partner)):
        whole = MixPlan(np.array([1]), np.array([share], np.float32), None)
        assert torch.equal(apply_mix(pixels, partner, whole), expected)


def test_cutmix_takes_the_partners_pixels_in_the_box():
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    cut = np.array([[1, 0, 3, 2], [0, 0, 0, 0]])  # top, left, bottom, right
    mixed = apply_mix(pixels, pixels + 7, MixPlan(np.array([1, 0]), np.ones(2, np.float32), cut))
    assert mixed[0, 2].tolist() == [[0, 0, 0, 0], [7, 7, 0, 0], [7, 7, 0, 0], [0, 0, 0, 0]]
    assert not mixed[1].any()


def plan(text: str, samples: np.ndarray = SAMPLES, size: int = 32) -> MixPlan:
    return plan_mix(ViewPolicy.parse(text), 5, 2, samples, len(SAMPLES), size)


@pytest.mark.parametrize("text", ["none+mixup(0.3)", "none+cutmix(1.0)"])
def test_a_mix_plan_follows_its_definition(text):
    mixing = plan(text, np.arange(300))
    shares = [foreign_views.label_share(text, 32, 5, 2, sample) for sample in range(300)]
    np.testing.assert_array_equal(mixing.weights, np.float32(shares))


@pytest.mark.parametrize("text", ["none+mixup(1.0)", "none+cutmix(1.0)"])
def test_partners_are_uniform_over_all_other_samples(text):
    offsets = (plan(text).partners - SAMPLES) % len(SAMPLES)
    assert offsets.min() > 0  # never itself
    distance = stats.kstest(offsets / len(SAMPLES), "uniform").statistic
    assert distance < 1.95 / math.sqrt(len(SAMPLES))
    # A sample is the partner of one other on average, and of none with probability 1/e.
    chosen = np.bincount(plan(text).partners, minlength=len(SAMPLES))
    assert abs((chosen == 0).mean() - math.exp(-1)) < 0.02


def test_two_samples_are_partners_and_a_single_one_is_its_own_partner():
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


def test_a_teacher_trains_on_resized_crops(project):
    before = bytes_of(TEACHER.model)
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))["teacher"]["training"]
    change_params("teacher", training=params | {"policy": RRC})
    run_stage("teacher")
    assert bytes_of(TEACHER.model) != before


def test_a_store_of_another_strength_is_refused(project):
    text = f"{RRC}+rand_augment(2,9)+mixup(0.4)"
    index = json.loads((STORE / "store.json").read_text("utf-8")) | {"policy": text}
    (STORE / "store.json").write_text(json.dumps(index))
    for changed, now in (
        (
            {"rand_augment": {"operations": 2, "magnitude": 10}},
            r"rand_augment\(2,10\)\+mixup\(0.4\)",
        ),
        ({"mix": {"method": "mixup", "alpha": 0.5}}, r"rand_augment\(2,9\)\+mixup\(0.5\)"),
        ({"mix": "none"}, r"rand_augment\(2,9\)"),
    ):
        change_params("views", **MIXUP | changed)
        message = rf"for view policy .*\(2,9\)\+mixup\(0.4\), but params.yaml says .*\+{now}\."
        with pytest.raises(UserError, match=message):
            opened()


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
