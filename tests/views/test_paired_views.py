"""A pair of views is two views of each image, each exactly that of its own policy and seed."""

from pathlib import Path

import foreign_views
import numpy as np
import pytest
import torch
from conftest import run_stage, write_params
from encoded_photographs import encoded_params, write_pictures
from policy_views import images

from pipeline.data.prepared.dataset import Split, open_dataset
from pipeline.runtime.errors import UserError
from pipeline.runtime.validation import validate
from pipeline.views.loader import open_views
from pipeline.views.params import ViewsParams
from pipeline.views.policy import PairedPolicy, ViewPolicy, parse_policy
from pipeline.views.random_numbers import strong_seed

CPU = torch.device("cpu")
STRONG = ViewPolicy("crop_flip", (2, 10))
PAIR = PairedPolicy(ViewPolicy("crop_flip"), STRONG)


def split_of(pixels: np.ndarray) -> Split:
    return Split(np.zeros(len(pixels), np.int64), Path(), "train", pixels)


@pytest.mark.parametrize("weak", ["none", "crop_flip", "random_resized_crop"])
def test_each_view_of_a_pair_is_that_of_its_policy_alone(weak):
    pair = PairedPolicy(ViewPolicy(weak), STRONG)
    split, order = split_of(images().numpy()), [np.arange(7), np.arange(39, 3, -2)]
    pairs = list(open_views(split, pair, 5, CPU).batches(3, order))
    alone = [
        list(open_views(split, policy, seed, CPU).batches(3, order))
        for policy, seed in ((pair.weak, 5), (pair.strong, strong_seed(5)))
    ]
    for batch, of_weak, of_strong, samples in zip(pairs, *alone, order, strict=True):
        assert np.array_equal(batch.samples, samples)
        assert torch.equal(batch.pixels, of_weak.pixels)
        assert torch.equal(batch.strong_pixels, of_strong.pixels)


def test_the_views_of_a_pair_are_those_of_an_independent_implementation():
    pixels = images().numpy()
    (batch,) = open_views(split_of(pixels), PAIR, 5, CPU).batches(3, [np.arange(6)])
    for row in range(6):
        for number, found in ((6, batch.pixels[row]), (7, batch.strong_pixels[row])):
            policy, seed, view = foreign_views.of_pair(str(PAIR), 5, number)
            assert np.array_equal(found, foreign_views.view_of(pixels, policy, seed, view, row))


def test_both_views_of_one_policy_have_random_numbers_of_their_own():
    pair = PairedPolicy(ViewPolicy("crop_flip"), ViewPolicy("crop_flip"))
    (batch,) = open_views(split_of(images().numpy()), pair, 5, CPU).batches(0, [np.arange(40)])
    same = (batch.pixels == batch.strong_pixels).flatten(1).all(1)
    assert same.sum() <= 2  # of 162 views


def test_pairs_of_encoded_images_are_decoded_for_each_view(folder):
    write_pictures(folder / "images")
    write_params(folder, encoded_params())
    run_stage("prepare")
    split = open_dataset().resized(16).splits["train"]
    pair = PairedPolicy(ViewPolicy("none"), ViewPolicy("random_resized_crop"))
    order = [np.arange(5), np.arange(5, 9)]
    pairs = list(open_views(split, pair, 5, CPU, num_workers=0).batches(1, order))
    strong = open_views(split, pair.strong, strong_seed(5), CPU, num_workers=0).batches(1, order)
    weak = open_views(split, pair.weak, 5, CPU, num_workers=0).batches(1, order)
    for batch, of_weak, of_strong in zip(pairs, weak, strong, strict=True):
        assert torch.equal(batch.pixels, of_weak.pixels)
        assert torch.equal(batch.strong_pixels, of_strong.pixels)
        assert not torch.equal(batch.pixels, batch.strong_pixels)


def views_params(**changes: object) -> ViewsParams:
    plain = {"policy": "crop_flip", "rand_augment": "none", "mix": "none", "count": 3, "seed": 7}
    return validate(ViewsParams, plain | {"image_size": 16} | changes, "params.yaml: views")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"rand_augment": {"weak": "none", "strong": {"operations": 2, "magnitude": 10}}},
            "weak=crop_flip;strong=crop_flip+rand_augment(2,10)",
        ),
        (
            {"policy": {"weak": "none", "strong": "crop"}, "rand_augment": {"magnitude": 1}},
            "weak=none+rand_augment(2,1);strong=crop+rand_augment(2,1)",
        ),
        (
            {
                "policy": {"weak": "crop", "strong": "random_resized_crop"},
                "rand_augment": {"weak": {}, "strong": "none"},
            },
            "weak=crop+rand_augment(2,9);strong=random_resized_crop",
        ),
    ],
)
def test_one_value_is_of_both_views_and_two_are_of_each(changes, text):
    params = views_params(**changes)
    assert str(params.view_policy) == text
    assert parse_policy(text) == params.view_policy
    assert params.num_views == 6  # three of each


def test_all_pairs_are_as_many_as_show_every_view():
    params = views_params(policy={"weak": "crop", "strong": "crop_flip"}, count="all")
    assert params.num_views == 2 * 162


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"policy": {"wek": "crop", "stong": "crop"}},
            r"crop_flip, random_resized_crop, or `{weak: ..., strong: ...}`",
        ),
        (
            {"rand_augment": {"weak": "none", "strong": {}, "operations": 2}},
            "views.rand_augment`: operations beside weak or strong; expected within them",
        ),
        ({"policy": {"weak": "crop"}}, "views.policy.strong` is missing"),
        ({"policy": {"weak": "crop", "strong": "cut"}}, "views.policy.strong` is 'cut'; expected"),
        (
            {"rand_augment": {"weak": "none", "strong": {"operation": 2}}},
            "views.rand_augment.strong.operation` is unknown; did you mean `operations`",
        ),
        (
            {"rand_augment": {"operation": 2}},
            "Known: magnitude, operations, strong, weak",
        ),
        (
            {"policy": {"weak": "none", "strong": "crop"}, "mix": {"method": "mixup"}},
            "views`: mix is mixup, but the views are pairs.* set mix: none",
        ),
        (
            {"policy": {"weak": "none", "strong": "crop"}, "count": 82},
            "`weak=none;strong=crop` has 81 distinct views: set count to 1 ... 81",
        ),
    ],
)
def test_what_is_no_pair_is_refused_where_it_is_written(changes, message):
    with pytest.raises(UserError, match=message):
        views_params(**changes)


@pytest.mark.parametrize("text", ["weak=crop", "weak=crop;strong=", "weak=crop;strong=cut"])
def test_a_text_that_is_no_pair_is_refused(text):
    with pytest.raises(ValueError, match="is no view policy"):
        parse_policy(text)
