"""Large images stored as encoded bytes: the same views in every stage and process."""

import io
import json
import multiprocessing
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    bytes_of,
    compare_every_network,
    opened,
    run_stage,
    train_every_network,
    write_params,
)
from encoded_photographs import encoded_params, picture, write_pictures
from import_closure import ROOT
from PIL import Image, UnidentifiedImageError
from safetensors.numpy import load_file

from pipeline.commands.store import verify
from pipeline.comparison.example_images import THUMBNAIL, clean_pixels
from pipeline.comparison.measurement.corruptions import CORRUPTIONS, corrupt
from pipeline.data.prepared.dataset import Dataset, Split, encoded_path, open_dataset
from pipeline.data.prepared.image_decoding import clean_boxes, decode_view, eight_bits
from pipeline.data.sources.image_reading import map_in_threads
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict
from pipeline.runtime.derived_random import permutation
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.runtime.outputs import TEACHER, ExportOutputs, ModelOutputs
from pipeline.views import loader as views_module
from pipeline.views.geometry import apply_views, crop_boxes, flips, plan_views
from pipeline.views.loader import EncodedViews, Views, open_views
from pipeline.views.policy import ViewPolicy

CPU = torch.device("cpu")
PREPARED, STORE = Path("data/prepared"), Path("data/soft_targets")
PHOTOGRAPHS = ROOT.parent / "shared/data/imagenet_samples.tar"


@pytest.fixture(scope="module")
def trained_on_encoded_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoded")
    write_pictures(root / "images")
    train_every_network(root, encoded_params())
    return root


@pytest.fixture
def encoded_project(
    trained_on_encoded_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of a project in which every network is trained, as the current folder."""
    root = tmp_path / "project"
    shutil.copytree(trained_on_encoded_images, root)
    monkeypatch.chdir(root)
    return root


def prepare(**dataset: object) -> Dataset:
    write_params(Path(), encoded_params(**dataset))
    run_stage("prepare")
    return open_dataset()


# What `prepare` writes.


def test_images_are_reduced_to_image_size_never_enlarged_and_keep_their_aspect_ratio(folder):
    write_pictures(folder / "images")
    split = prepare().splits["train"]
    for sample, sample_id in enumerate(split.sample_ids):
        source = Image.open(folder / "images" / sample_id)
        image = Image.open(io.BytesIO(split.content(sample)))
        assert image.format == "JPEG"
        assert image.size == tuple(split.sizes[sample][::-1])
        assert min(image.size) == min(64, *source.size)
        ratio = source.width / source.height
        assert image.width / image.height == pytest.approx(ratio, rel=0.5 / min(image.size))
        shown = np.asarray(image.resize((8, 8), Image.Resampling.BOX), int)
        there = np.asarray(source.resize((8, 8), Image.Resampling.BOX), int)
        assert np.abs(shown - there).mean() < 3


def test_quality_original_keeps_the_sources_bytes(folder):
    write_pictures(folder / "images")
    split = prepare(quality="original").splits["test"]
    for sample, sample_id in enumerate(split.sample_ids):
        path = folder / "images" / sample_id
        assert split.content(sample) == path.read_bytes()
        assert tuple(split.sizes[sample]) == Image.open(path).size[::-1]


def test_preparing_again_or_in_another_order_writes_equal_bytes(folder):
    write_pictures(folder / "images")
    prepare()
    before = bytes_of(PREPARED)
    prepare()
    assert bytes_of(PREPARED) == before
    with tarfile.open(folder / "images.tar", "w") as archive:
        for path in sorted((folder / "images").rglob("*.*"), reverse=True):
            archive.add(path, path.relative_to(folder / "images"))
    prepare(root="images.tar")
    assert bytes_of(PREPARED) == before


def test_the_fingerprint_covers_one_encoded_byte(folder):
    write_pictures(folder / "images")
    path = folder / "images/train/bee/3.png"
    content = path.read_bytes()
    path.write_bytes(content + b"\0")  # after the image's end
    before = prepare(quality="original").fingerprint
    path.write_bytes(content + b"\1")
    assert prepare(quality="original").fingerprint != before


def test_statistics_equal_those_of_the_same_images_stored_as_pixels(folder):
    write_pictures(folder / "images")
    encoded, pixels = prepare(), prepare(storage="pixels")
    assert (encoded.mean, encoded.std) == (pixels.mean, pixels.std)
    assert encoded.fingerprint != pixels.fingerprint


def test_a_file_of_another_length_is_refused_on_opening(encoded_project):
    path = PREPARED / "train_images.bin"
    content = path.read_bytes()
    for other in (content[:-1], content + b"x"):
        path.write_bytes(other)
        with pytest.raises(UserError, match=rf"holds {len(other):,} bytes; expected .* Run `dvc"):
            open_dataset()
    path.unlink()
    with pytest.raises(UserError, match="train_images.bin` cannot be read"):
        open_dataset()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_damaged_after_preparing_is_named_without_a_traceback(encoded_project, workers):
    path, split = PREPARED / "train_images.bin", open_dataset().splits["train"]
    content = bytearray(path.read_bytes())
    content[split.offsets[3] : split.offsets[3] + 20] = bytes(20)
    path.write_bytes(content)
    split = open_dataset().splits["train"]
    views = open_views(split, ViewPolicy("none"), 0, CPU, num_workers=workers)
    with pytest.raises(UserError) as refusal:
        list(views.batches(0, np.split(np.arange(len(split)), 3)))
    message = str(refusal.value)
    assert "cannot be decoded, sample 3 (" in message
    assert "Traceback" not in message


def test_images_pass_through_memory_few_at_a_time_and_in_order(monkeypatch):
    monkeypatch.setattr("pipeline.data.sources.image_reading.available_cores", lambda: 3)
    taken = []
    results = map_in_threads(lambda number: -number, (taken.append(n) or n for n in range(100)))
    for expected in range(20):
        assert next(results) == -expected
        assert len(taken) <= expected + 1 + 2 * 3
    assert list(results) == [-number for number in range(20, 100)]


def test_a_killed_worker_is_reported_without_a_traceback(encoded_project, monkeypatch):
    monkeypatch.setattr("pipeline.views.loader.decode_view", lambda *_, **__: os._exit(9))
    split = open_dataset().splits["train"]
    views = open_views(split, ViewPolicy("none"), 0, CPU, num_workers=1)
    with pytest.raises(UserError, match="a process that decodes images has ended"):
        list(views.batches(0, np.split(np.arange(len(split)), 3)))


# What a view shows.


def upright_view(image: Image.Image, box: np.ndarray, side: int, channels: int) -> np.ndarray:
    """The definition: decode the whole image, turn it upright, let Pillow cut and resize."""
    top, left, height, width = box
    image = eight_bits(image).convert("RGB" if channels == 3 else "L")
    corners = (left, top, left + width, top + height)
    view = np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=corners))
    return view.transpose(2, 0, 1) if channels == 3 else view[None]


def saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 57, 3), dtype=np.uint8))
DEEP = Image.fromarray(np.arange(40 * 57, dtype=np.uint16).reshape(40, 57) * 28)
FORMS = {
    "RGB": (NOISE, "PNG"),
    "greyscale": (NOISE.convert("L"), "JPEG"),
    "CMYK": (NOISE.convert("CMYK"), "JPEG"),
    "palette": (NOISE.convert("P"), "PNG"),
    "16-bit": (DEEP, "PNG"),
    "transparent": (NOISE.convert("RGBA"), "WEBP"),
    "one pixel": (NOISE.crop((0, 0, 1, 1)), "PNG"),
    "one row": (NOISE.crop((0, 0, 57, 1)), "JPEG"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_views_of_images_of_any_mode_and_size_equal_pillows(form, channels):
    image, file_format = FORMS[form]
    content = saved(image, file_format)
    size = np.array([image.size[::-1]])
    for box in (
        clean_boxes(size, 32)[0],
        crop_boxes(0, 3, np.arange(1), size)[0],
    ):
        view = decode_view(content, size[0], box, 32, channels)
        assert view.shape == (channels, 32, 32)
        expected = upright_view(Image.open(io.BytesIO(content)), box, 32, channels)
        assert np.array_equal(view, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("side", [9, 24, 70])  # decoded at 1/8, 1/4 and whole
def test_a_view_of_a_reduced_and_rotated_jpeg_is_near_that_of_the_whole_image(orientation, side):
    """Within 2.5 levels of 255 on average, 12 at most, on a smooth image of odd sides."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(picture(0, 1, (203, 150)), "JPEG", quality=95, exif=exif)
    image = Image.open(io.BytesIO(content))
    size = np.array([eight_bits(image).size[::-1]])
    for box in (clean_boxes(size, side)[0], np.array([0, 0, 100, 80]), np.array([size[0, 0] - 99,
            size[0, 1] - 98, 99, 98])):  # fmt: skip
        view = decode_view(content, size[0], box, side, 3).astype(int)
        difference = np.abs(view - upright_view(Image.open(io.BytesIO(content)), box, side, 3))
        assert difference.mean() < 2.5
        assert difference.max() <= 12


@pytest.mark.parametrize(
    ("part", "side", "reduction"), [(127, 16, 4), (128, 16, 8), (31, 16, 1), (33, 16, 2)]
)
def test_a_jpeg_is_decoded_no_smaller_than_the_view(monkeypatch, part, side, reduction):
    content = saved(picture(0, 1, (150, 203)), "JPEG")
    decoded = []

    def watched(image):
        image.load()
        decoded.append(image.size)
        return eight_bits(image)

    monkeypatch.setattr("pipeline.data.prepared.image_decoding.eight_bits", watched)
    decode_view(content, (150, 203), (10, 20, part, part), side, 3)
    assert decoded == [(-(-203 // reduction), -(-150 // reduction))]
    assert part / reduction >= side or reduction == 1


def test_the_clean_view_is_the_imagenet_standard():
    """Resize the shorter side to 256, cut out the middle 224. Our box is not rounded to whole
    pixels of the resized image, so pixels agree within 3 levels on smooth images."""
    for size in ((300, 400), (500, 353), (200, 231)):
        image = picture(1, 2, size)
        width, height = (round(length * 256 / min(size)) for length in image.size)
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - 224) // 2, (height - 224) // 2
        expected = np.asarray(resized.crop((left, top, left + 224, top + 224)))
        box = clean_boxes(np.array([size]), 224)[0]
        view = decode_view(saved(image, "PNG"), size, box, 224, 3).transpose(1, 2, 0)
        assert np.abs(view.astype(int) - expected).max() <= 3


@pytest.mark.parametrize("policy", ["none", "crop", "crop_flip", "random_resized_crop"])
def test_each_policy_shows_its_part_of_the_image(encoded_project, policy):
    split = open_dataset().resized(16).splits["train"]
    samples, plan = np.array([5, 0, 11]), ViewPolicy(policy)
    sizes = split.sizes[samples]
    (batch,) = open_views(split, plan, 3, CPU).batches(2, [samples])
    resized_crop = policy == "random_resized_crop"
    parts = crop_boxes(3, 2, samples, sizes) if resized_crop else clean_boxes(sizes, 16)
    expected = np.stack(
        [
            decode_view(split.content(n), split.sizes[n], part, 16, 3)
            for n, part in zip(samples, parts, strict=True)
        ]
    )
    if resized_crop:
        flipped = flips(3, 2, samples)
        expected[flipped] = expected[flipped][..., ::-1]
    elif policy.startswith("crop"):
        (planned,) = plan_views(plan, 3, 2, [samples], 16, CPU)
        expected = apply_views(torch.from_numpy(expected), planned).numpy()
    assert np.array_equal(batch.pixels.numpy(), expected)
    assert np.array_equal(batch.samples, samples)


# The same in every process.


def all_views(order: list[np.ndarray], workers: int, policy: str = "random_resized_crop"):
    split = open_dataset().resized(16).splits["train"]
    views = open_views(split, ViewPolicy.parse(policy), 5, CPU, num_workers=workers)
    pixels = np.empty((len(split), 3, 16, 16), np.uint8)
    for batch in views.batches(1, order):
        pixels[batch.samples] = batch.pixels.numpy()
    return pixels


@pytest.mark.parametrize(
    "policy", ["random_resized_crop+rand_augment(2,9)+mixup(0.4)", "crop_flip+cutmix(1.0)"]
)
def test_replay_is_identical_for_any_batch_size_order_and_number_of_workers(
    encoded_project, policy
):
    count = len(open_dataset().splits["train"])
    whole = all_views([np.arange(count)], 0, policy)
    for batch_size, workers in ((1, 0), (5, 1), (7, 2)):
        order = permutation(count, batch_size)
        parts = np.split(order, range(batch_size, count, batch_size))
        assert np.array_equal(all_views(parts, workers, policy), whole)


def test_replay_is_identical_in_workers_that_are_spawned(encoded_project, monkeypatch):
    count = len(open_dataset().splits["train"])
    parts = np.split(np.arange(count), range(5, count, 5))
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        spawned = all_views(parts, 1)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert np.array_equal(spawned, all_views(parts, 0))


def test_batches_come_in_the_order_given_and_leave_torchs_generator_alone(encoded_project):
    split = open_dataset().resized(16).splits["train"]
    order = np.split(permutation(len(split), 1), 6)
    before = torch.random.get_rng_state()
    views = open_views(split, ViewPolicy("none"), 0, CPU, num_workers=2)
    samples = [batch.samples for batch in views.batches(0, order)]
    assert all(np.array_equal(*pair) for pair in zip(samples, order, strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_two_interleaved_passes_do_not_affect_each_other(encoded_project):
    split = open_dataset().resized(16).splits["train"]
    views = open_views(split, ViewPolicy("random_resized_crop"), 0, CPU, num_workers=1)
    order = np.split(np.arange(len(split)), 3)
    apart = [list(views.batches(view, order)) for view in (0, 1)]
    together = zip(views.batches(0, order), views.batches(1, order), strict=True)
    for pair, expected in zip(together, zip(*apart, strict=True), strict=True):
        assert torch.equal(pair[0].pixels, expected[0].pixels)
        assert torch.equal(pair[1].pixels, expected[1].pixels)


def view_of(views: EncodedViews, view: int, order: list[np.ndarray]) -> torch.Tensor:
    return torch.cat([batch.pixels for batch in views.batches(view, order)])


def test_workers_decode_one_pass_after_the_other_and_end_with_the_views(encoded_project):
    split = open_dataset().resized(16).splits["train"]
    order, before = np.split(np.arange(len(split)), 6), set(workers_of_this_process())
    views = open_views(split, ViewPolicy("random_resized_crop"), 0, CPU, num_workers=2)
    assert set(workers_of_this_process()) == before  # none before the first pass
    first, started = view_of(views, 0, order), set(workers_of_this_process()) - before
    second, single = view_of(views, 1, order[::-1]), view_of(views, 2, order[:1])
    assert set(workers_of_this_process()) - before == started
    assert len(started) == 2
    del views
    assert not started & set(workers_of_this_process())
    alone = open_views(split, ViewPolicy("random_resized_crop"), 0, CPU, num_workers=0)
    for view, (found, parts) in enumerate(
        [(first, order), (second, order[::-1]), (single, order[:1])]
    ):
        assert torch.equal(found, view_of(alone, view, parts))


def workers_of_this_process() -> list[int]:
    return [process.pid for process in multiprocessing.active_children()]


@pytest.mark.parametrize("end", ["closed", "unreadable image", "killed worker"])
def test_a_pass_that_ends_early_leaves_nothing_to_the_next(encoded_project, monkeypatch, end):
    split = open_dataset().resized(16).splits["train"]
    order, policy = np.split(np.arange(len(split)), 6), ViewPolicy("random_resized_crop")
    expected = view_of(open_views(split, policy, 0, CPU, num_workers=0), 1, order)
    views = open_views(split, policy, 0, CPU, num_workers=2)
    with monkeypatch.context() as patch:
        if end != "closed":
            failing = {
                "unreadable image": unreadable,
                "killed worker": lambda *_, **__: os._exit(9),
            }
            patch.setattr(views_module, "decode_view", failing[end])
            with pytest.raises(UserError):
                view_of(views, 0, order)
        else:
            passing = views.batches(0, order)
            next(passing)
            passing.close()
    assert torch.equal(view_of(views, 1, order), expected)


def unreadable(*_: object, **__: object) -> None:
    raise UnidentifiedImageError("no image")


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(8, None, 8), (8, "4", 2), (2, "4", 1)]
)
def test_the_cores_are_shared_among_the_processes(monkeypatch, cores, processes, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert views_module.default_workers() == workers


@pytest.mark.parametrize(("free", "device"), [(2 * 96, "meta"), (2 * 96 - 1, "cpu")])
def test_images_go_to_the_device_if_they_fit_in_half_of_its_free_memory(monkeypatch, free, device):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free, 10 * free))
    images = np.zeros((2, 3, 4, 4), np.uint8)
    split = Split(np.zeros(2, np.int64), Path(), "train", images)
    views = Views(split, ViewPolicy("none"), 0, torch.device("meta"))  # stands for a GPU
    assert views._images.device.type == device


# A whole project.


def test_the_teacher_and_the_students_get_views_of_their_own_size(encoded_project):
    for model in ("teacher", "students/small", "baselines/small"):
        assert read_json(f"models/{model}/network.json", produced_by="-")["input"]["size"] == 16
    dataset = open_dataset()
    assert dataset.image_size == 64
    assert dataset.resized(24).splits["test"].image_size == 24


def test_the_store_contains_the_teachers_logits_for_views_of_encoded_images(encoded_project):
    assert "of them match the teacher's logits" in verify(STORE, recompute=30, seed=1)


def test_canaries_detect_images_of_another_decoder(encoded_project):
    """The fingerprint is unchanged, but the bytes of one image, a canary, are not."""
    split, path = open_dataset().splits["train"], PREPARED / "train_images.bin"
    content = bytearray(path.read_bytes())
    image = content[split.offsets[0] : split.offsets[1]]
    middle = split.offsets[0] + 3 * len(image) // 4
    content[middle : middle + 8] = bytes(8)
    path.write_bytes(content)
    with pytest.raises(UserError, match="has canaries that differ"):
        opened()


# Photographs.


@pytest.mark.skipif(not PHOTOGRAPHS.exists(), reason=f"photographs are not at {PHOTOGRAPHS}")
@pytest.mark.slow
@pytest.mark.parametrize("quality", [90, "original"])
def test_photographs_are_prepared_and_viewed(folder, quality):
    with tarfile.open(PHOTOGRAPHS) as source, tarfile.open("images.tar", "w") as target:
        for number, member in enumerate(m for m in source if m.isreg()):
            content = source.extractfile(member)
            member.name = f"train/{'ab'[number % 2]}/{Path(member.name).name}"
            target.addfile(member, content)
    dataset = prepare(root="images.tar", quality=quality, image_size=256)
    split = dataset.resized(64).splits["train"]
    assert sum(len(s) for s in dataset.splits.values()) == 62
    assert (split.sizes.min(1).max() == 256) == (quality == 90)
    (batch,) = open_views(split, ViewPolicy("none"), 0, CPU).batches(0, [np.arange(len(split))])
    for sample in range(0, len(split), 7):
        image = Image.open(io.BytesIO(split.content(sample)))
        box = clean_boxes(split.sizes[[sample]], 64)[0]
        expected = upright_view(image, box, 64, 3)
        assert np.abs(batch.pixels[sample].numpy() - expected.astype(int)).mean() < 4


# What `compare` shows.


def test_the_report_shows_the_clean_views_of_encoded_images(encoded_project):
    split = open_dataset().splits["test"]
    for sample in range(len(split)):
        image = Image.open(io.BytesIO(split.content(sample)))
        box = clean_boxes(split.sizes[[sample]], 64)[0]
        expected = upright_view(image, box, THUMBNAIL, 3).astype(int)
        pixels = clean_pixels(split, sample, THUMBNAIL)
        assert np.abs(expected - pixels).mean() < 3  # levels; JPEG at a part of its size


def test_an_encoded_image_that_cannot_be_shown_is_named(encoded_project):
    split = open_dataset().splits["test"]
    path = encoded_path(split.directory, "test")
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(
        UserError, match=r"`train/\w+/\d\.\w+` of test cannot .* `dvc repro prepare`"
    ):
        clean_pixels(open_dataset().splits["test"], 0, THUMBNAIL)


@pytest.mark.slow
def test_accuracy_without_corruption_is_the_test_accuracy_where_views_have_another_size(
    encoded_project,
):
    """Networks are measured, and images corrupted, at 16 pixels; the dataset has 64."""
    compare_every_network()
    size, dataset = 16, open_dataset()
    assert dataset.image_size != size
    test = dataset.splits["test"].resized(size)
    models = [TEACHER, *(ModelOutputs(role, "small") for role in ("distilled", "baseline"))]
    views = open_views(test, ViewPolicy("none"), 0, CPU, num_workers=0)
    (batch,) = views.batches(0, [np.arange(len(test))])
    corrupted = [
        corrupt(image, i, corruption="blur", severity=1)
        for i, image in enumerate(batch.pixels.numpy())
    ]
    table = pd.read_csv("reports/comparison.csv")
    page = Path("reports/index.html").read_text("utf-8")
    section = page.partition('id="corruption"')[2].partition("</section>")[0]
    shown = re.findall(r'<td data-label="clean"><span>(.+?)</span>', section)
    for model, accuracy, clean in zip(models, table["accuracy"], shown, strict=True):
        network, spec = checkpoint.load(model.model, produced_by="-")
        tensors = load_file(ExportOutputs(model.name).corrupted_predictions)
        assert tensors["image_size"].tolist() == [size]
        logits = load_file(model.predictions)["test"]
        assert torch.equal(predict(network, spec.input, batch.pixels), torch.from_numpy(logits))
        blurred = predict(network, spec.input, torch.from_numpy(np.stack(corrupted))).argmax(1)
        classes = tensors[f"{model.role}.float32"]
        assert classes[CORRUPTIONS.index("blur"), 0].tolist() == blurred.tolist()
        metrics = json.loads(model.metrics.read_text("utf-8"))
        assert clean == f"{accuracy:.2%}" == f"{metrics['test_accuracy']:.2%}"
        assert accuracy == metrics["test_accuracy"]
    assert f"of\n{size} pixels a side" in section
    assert "which is the test accuracy" in section
