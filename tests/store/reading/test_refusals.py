"""A damaged store is refused, and a store that was written for other inputs."""

import shutil
from dataclasses import fields
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml
from conftest import bytes_of, change_params, opened, run_stage, write_images, write_params

from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, write_json
from pipeline.store.format.schema import ShardKey, StoreIdentity
from pipeline.store.reading.index import read_index
from pipeline.store.reading.store import Store, open_shards
from pipeline.views import geometry

STORE = Path("data/soft_targets")
SHARD = STORE / "train_view00001_sample000000000.h5"


def change_index(**values: object) -> None:
    index = read_json(STORE / "store.json", produced_by="-") | values
    write_json(STORE / "store.json", {k: v for k, v in index.items() if v is not None})


def test_a_store_is_accepted_with_keys_of_another_writer(project):
    change_index(written_by="another system")
    assert opened().num_views == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 8}, "written for views.seed 7, but params.yaml says 8"),
        ({"policy": "crop"}, "written for view policy crop_flip, but params.yaml says crop"),
        ({"count": 4}, "written for views.count 3, but params.yaml says 4"),
        ({"image_size": 12}, "written for views.image_size 16, but params.yaml says 12"),
    ],
)
def test_a_store_of_another_view_plan_is_refused(project, changed, message):
    change_params("views", **changed)
    with pytest.raises(UserError, match=message) as refusal:
        opened()
    assert "Run `dvc repro soft_targets`" in str(refusal.value)


def test_a_store_of_another_dataset_is_refused(project):
    write_images(Path("images"), per_class=21)
    run_stage("prepare")
    with pytest.raises(
        UserError, match=r"written for dataset \w{12}…, but data/prepared is \w{12}…"
    ):
        opened()


def test_a_store_of_another_teacher_is_refused(project):
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    params["teacher"]["training"]["seed"] = 99
    write_params(Path(), params)
    run_stage("teacher")
    with pytest.raises(
        UserError, match=r"written for teacher \w{12}…, but models/teacher is \w{12}…"
    ):
        opened()


def test_a_student_refuses_such_a_store_and_keeps_its_old_outputs(project):
    before = bytes_of(Path("models/students/small"))
    change_params("views", seed=8)
    with pytest.raises(UserError, match="views.seed"):
        run_stage("student", "small")
    assert bytes_of(Path("models/students/small")) == before


def test_changed_augmentation_code_is_caught_by_the_canaries(project, monkeypatch):
    original = geometry._windows_one_by_one

    def transposed(padded, places):  # top, left, whether it is mirrored
        return original(padded, places[:, [1, 0, 2]])

    monkeypatch.setattr(geometry, "_windows_one_by_one", transposed)
    with pytest.raises(UserError, match="canaries that differ: the images or the augmentation"):
        opened()


def test_changed_images_under_the_same_fingerprint_are_caught_by_the_canaries(project):
    path = Path("data/prepared/train_images.npy")
    images = np.load(path)
    np.save(path, 255 - images)
    with pytest.raises(UserError, match="canaries that differ: the images or the augmentation"):
        opened()


@pytest.mark.parametrize(("key", "value"), [("seed", 8), ("policy", "crop")])
def test_a_store_relabelled_for_another_view_plan_is_caught_by_the_canaries(project, key, value):
    for path in STORE.glob("train_*.h5"):
        with h5py.File(path, "r+") as file:
            file.attrs[key] = np.bytes_(value) if isinstance(value, str) else value
    write_json(
        STORE / "store.json", read_json(STORE / "store.json", produced_by="-") | {key: value}
    )
    for path in (*STORE.glob("validation_*.h5"), *STORE.glob("test_*.h5")):
        with h5py.File(path, "r+") as file:
            file.attrs["seed"] = 8 if key == "seed" else 7
    change_params("views", **{key: value})
    with pytest.raises(UserError, match="canaries that differ: the images or the augmentation"):
        opened()


def test_a_missing_shard_is_refused(project):
    SHARD.unlink()
    with pytest.raises(UserError, match="sample000000000.h5` is absent"):
        opened()


def test_an_absent_store_is_refused(project):
    shutil.rmtree(STORE)
    with pytest.raises(
        UserError,
        match=r"absent.*dvc pull data/soft_targets/store.json.*or `dvc repro soft_targets`",
    ):
        opened()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_shard_is_refused(project, share):
    content = SHARD.read_bytes()
    SHARD.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="is damaged"):
        opened()


def test_a_flipped_bit_in_any_row_is_refused(project):
    with h5py.File(SHARD, "r") as file:
        offset = file["logits"].id.get_offset()
    content = bytearray(SHARD.read_bytes())
    content[offset + 17] ^= 1
    SHARD.write_bytes(content)
    with pytest.raises(UserError, match="logits do not match their checksum"):
        opened()


def test_a_shard_of_another_store_is_refused(project):
    shutil.copy(STORE / "train_view00002_sample000000000.h5", SHARD)
    with pytest.raises(UserError, match="says view 2; expected 1"):
        opened()


@pytest.mark.parametrize("version", [3, 99])
def test_a_newer_format_is_refused_with_the_advice_to_update(project, version):
    change_index(format_version=version)
    with pytest.raises(UserError, match=f"format version {version}; expected 2: update Teach Once"):
        opened()


@pytest.mark.parametrize("version", [0, "2", None])
def test_an_unknown_version_is_refused_with_the_command_that_writes_the_store_again(
    project, version
):
    change_index(format_version=version)
    with pytest.raises(
        UserError, match=f"format version {version}; expected 2\\.\nRemove it and run `dvc"
    ):
        opened()


FIELDS = [*StoreIdentity.model_fields, *(field.name for field in fields(ShardKey))]


@pytest.mark.parametrize("field", ["format_version", *(name for name in FIELDS if name != "k")])
def test_a_shard_that_differs_in_any_one_field_is_refused_by_its_name(project, field):
    with h5py.File(SHARD, "r+") as file:
        value = file.attrs[field]
        is_text = isinstance(value, bytes)
        file.attrs[field] = np.bytes_(value[:-1] + b"x") if is_text else value + 1
    with pytest.raises(UserError, match=f"says {field} .*; expected ") as refusal:
        opened()
    assert str(SHARD) in str(refusal.value)
    assert f"Remove `{STORE}` and run `dvc repro soft_targets`" in str(refusal.value)


def test_a_top_k_shard_of_another_k_is_refused(project):
    change_params("soft_targets", encoding="top_k", k=2)
    run_stage("soft_targets")
    assert opened().identity.k == 2
    with h5py.File(SHARD, "r+") as file:
        file.attrs["k"] = 1
    with pytest.raises(UserError, match="says k 1; expected 2"):
        opened()


CHANGES = {
    "dataset_fingerprint": "0" * 64,
    "teacher_fingerprint": "0" * 64,
    "policy": "crop",
    "seed": 8,
    "image_size": 12,
    "encoding": "sparse",
    "k": 2,
    "precision": "bfloat16",
    "num_classes": 4,
    "num_views": 4,
    "splits": {"train": 37, "validation": 12, "test": 12},
    "class_names": ["ant", "cat", "bee"],
}


def test_every_field_of_the_identity_is_changed_below():
    assert set(StoreIdentity.model_fields) < CHANGES.keys()


@pytest.mark.parametrize("field", CHANGES)
def test_an_index_that_differs_in_any_one_field_is_refused_by_its_name(project, field):
    change_index(**{field: CHANGES[field]})
    names = {"dataset_fingerprint": "dataset", "teacher_fingerprint": "teacher"}
    name = names.get(field, field.replace("num_views", "views.count"))
    with pytest.raises(UserError, match=rf"\b{name}[ `]"):
        opened()


@pytest.mark.parametrize("field", ["seed", "splits", "class_names"])
def test_an_index_without_a_field_is_refused_by_its_name(project, field):
    change_index(**{field: None})
    with pytest.raises(UserError, match=f"store.json: {field}` is missing"):
        opened()


@pytest.mark.parametrize(
    ("field", "value"), [("num_views", "3"), ("splits", 5), ("num_classes", 3.5), ("k", "2")]
)
def test_an_index_with_a_field_of_another_type_is_refused_by_its_name(project, field, value):
    change_index(**{field: value})
    with pytest.raises(UserError, match=f"store.json: {field}` is {value!r}; expected a "):
        opened()


def test_every_damaged_shard_is_named(project):
    SHARD.unlink()
    (STORE / "test_view00000_sample000000000.h5").write_bytes(b"no HDF5")
    with pytest.raises(UserError) as refusal:
        opened()
    message = str(refusal.value)
    assert f"`{SHARD}` is absent" in message
    assert "test_view00000_sample000000000.h5` is damaged and cannot be read" in message


def test_an_attribute_of_a_type_outside_the_format_is_not_read(project):
    """HDF5 stores a text of variable length elsewhere in the file, and would follow a reference."""
    with h5py.File(SHARD, "r+") as file:
        file.attrs["teacher"] = "a text of any length"
    with pytest.raises(UserError, match="is damaged: attribute `teacher` is object"):
        opened()


@pytest.mark.parametrize("encoding", ["dense", "top_k"])
def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(project, encoding):
    if encoding == "top_k":
        change_params("soft_targets", encoding="top_k", k=2)
        run_stage("soft_targets")
    whole, before = SHARD.read_bytes(), rows_of(opened())
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(0, len(whole), 25):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        SHARD.write_bytes(damaged)
        try:
            assert rows_of(opened()) == before  # free space of HDF5, or the padding of a name
        except UserError:
            refused += 1
    assert refused > 0


def rows_of(store: Store) -> list[bytes]:
    rows = [store.gather(view, np.arange(36)) for view in range(3)]
    return [array.tobytes() for row in rows for array in row if array is not None]


def test_opening_reads_no_row(project):
    with h5py.File(SHARD, "r") as file:
        offset, size = file["logits"].id.get_offset(), file["logits"].id.get_storage_size()
    content = bytearray(SHARD.read_bytes())
    content[offset : offset + size] = bytes(size)
    SHARD.write_bytes(content)
    store = open_shards(STORE, read_index(STORE), {})
    assert not any("arrays" in vars(shard) for shards in store.shards.values() for shard in shards)
    with pytest.raises(UserError, match="logits do not match their checksum"):
        opened()
