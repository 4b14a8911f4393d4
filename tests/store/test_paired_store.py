"""A store of pairs: the rows of weak and of strong views, each of its own policy, all verified."""

import shutil
from pathlib import Path

import foreign
import h5py
import numpy as np
import pytest
import torch
from conftest import bytes_of, change_params, opened, run_module, run_stage
from logit_tables import import_table, made_up_logits, table, write_npz

from pipeline.data.prepared.dataset import open_dataset
from pipeline.models import checkpoint
from pipeline.models.evaluation import predict
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json, write_json
from pipeline.runtime.outputs import TEACHER
from pipeline.views.loader import open_views
from pipeline.views.policy import ViewPolicy
from pipeline.views.random_numbers import strong_seed

STORE = Path("data/soft_targets")
STRONG = {"weak": "none", "strong": {"operations": 2, "magnitude": 10}}
TEXT = "weak=crop_flip;strong=crop_flip+rand_augment(2,10)"


@pytest.fixture
def paired(project):
    """The project, with two pairs of views in its store."""
    change_params("views", rand_augment=STRONG, count=2)
    run_stage("soft_targets")


def test_every_row_is_the_teachers_for_the_view_of_its_own_policy(project):
    single = {key: opened().gather(key, np.arange(36)).logits for key in (0, 1)}
    change_params("views", rand_augment=STRONG, count=2)
    run_stage("soft_targets")
    store, split = opened(), open_dataset().splits["train"]
    assert store.num_views == 4
    assert store.index.policy == TEXT
    teacher, spec = checkpoint.load(TEACHER.model, produced_by="-")
    seed, strong = 7, strong_seed(7)
    for pair in range(2):
        # The weak views are those of the policy alone, and so are their rows.
        weak_rows = store.gather(2 * pair, np.arange(36)).logits
        assert np.array_equal(weak_rows, single[pair])
        for view, policy, of in (
            (2 * pair, ViewPolicy("crop_flip"), seed),
            (2 * pair + 1, ViewPolicy("crop_flip", (2, 10)), strong),
        ):
            views = open_views(split, policy, of, torch.device("cpu"))
            (batch,) = views.batches(pair, [np.arange(36)])
            logits = predict(teacher, spec.input, batch.pixels).numpy()
            rows = store.gather(view, np.arange(36)).logits.astype(np.float32)
            assert np.abs(rows - logits).max() <= 2e-3 * np.abs(logits).max()


def test_the_command_verifies_and_inspects_both_views(paired, capsys):
    run_module("pipeline.commands.store", "verify", "--recompute", "144")
    assert "144 of them match the teacher's logits" in capsys.readouterr().out
    run_module("pipeline.commands.store", "inspect")
    found = capsys.readouterr().out
    assert f"{TEXT}, seed 7" in found
    assert "train 36 x 4 views" in found


def test_more_pairs_only_add_shards(paired):
    before = bytes_of(STORE)
    change_params("views", count=3)
    run_stage("soft_targets")
    after = bytes_of(STORE)
    assert set(after) - set(before) == {f"train_view{v:05d}_sample000000000.h5" for v in (4, 5)}
    assert all(after[name] == before[name] for name in before if name.endswith(".h5"))


def test_a_student_refuses_a_store_of_other_views(paired):
    for changes, message in (
        ({"rand_augment": "none"}, f"for view policy {TEXT}, but params.yaml says crop_flip."),
        (
            {"rand_augment": {"weak": "none", "strong": {"operations": 1, "magnitude": 10}}},
            f"view policy {TEXT}, but params.yaml says "
            "weak=crop_flip;strong=crop_flip+rand_augment(1,10).",
        ),
        ({"rand_augment": STRONG, "count": 3}, "for views.count 2, but params.yaml says 3."),
    ):
        change_params("views", **changes)
        with pytest.raises(UserError) as raised:
            run_stage("student", "small")
        lines = str(raised.value).splitlines()
        assert any(line.endswith(message) for line in lines)
        assert lines[-1] == "Run `dvc repro soft_targets`."


def test_a_student_of_pairs_refuses_a_store_of_single_views(project):
    change_params("views", rand_augment=STRONG)
    with pytest.raises(UserError) as raised:
        run_stage("student", "small")
    message = f"was written for view policy crop_flip, but params.yaml says {TEXT}.\nRun `dvc"
    assert message in str(raised.value)


def test_a_weak_shard_in_place_of_a_strong_one_is_refused(paired):
    name = "train_view0000{}_sample000000000.h5"
    shutil.copy(STORE / name.format(0), STORE / name.format(1))
    with pytest.raises(UserError, match="view00001.* says policy crop_flip; expected crop_flip.ra"):
        opened()


def test_canaries_cover_the_strong_views(paired):
    path = STORE / "train_view00003_sample000000000.h5"
    weak = STORE / "train_view00002_sample000000000.h5"
    with h5py.File(path, "r+") as file, h5py.File(weak, "r") as other:
        file["canaries"][:] = other["canaries"][:]
        file.attrs["canaries_sha256"] = other.attrs["canaries_sha256"]
    with pytest.raises(UserError, match="view00003.* has canaries that differ"):
        opened()


def test_an_index_with_half_a_pair_is_refused(paired):
    index = read_json(STORE / "store.json", produced_by="-")
    write_json(STORE / "store.json", index | {"num_views": 3})
    with pytest.raises(UserError, match="num_views is 3, but the views of .* an even number"):
        opened()


def test_a_store_of_pairs_that_a_foreign_writer_wrote_by_the_page_is_verified(paired):
    dataset, index = open_dataset(), read_json(STORE / "store.json", produced_by="-")
    keys = ("dataset_fingerprint", "teacher_fingerprint", "policy", "seed", "image_size")
    identity = {key: index[key] for key in (*keys, "precision", "num_classes", "encoding")}
    rng = np.random.default_rng(0)
    splits = {
        name: (
            split.images,
            split.labels,
            rng.standard_normal((4, len(split), 3)).astype("f4"),
        )
        for name, split in dataset.splits.items()
    }
    shutil.rmtree(STORE)
    foreign.write(STORE, identity, list(dataset.class_names), splits, num_views=4)
    rows = opened().gather(3, np.arange(36)).logits
    np.testing.assert_allclose(rows, splits["train"][2][3], rtol=2e-3, atol=2e-3)


def test_imported_logits_teach_pairs_by_their_views_and_half_a_pair_is_refused(project):
    change_params("views", rand_augment=STRONG, count=1)
    logits = made_up_logits()  # of three views
    with pytest.raises(UserError, match="has 3 views of train, but in params.yaml `views` are"):
        import_table(write_npz(table(logits)))
    logits["train"] = logits["train"][:2]
    store = import_table(write_npz(table(logits)))
    teacher = {"family": "logits", "network": "theirs", "weights": "logits", "checkpoint": store}
    change_params("teacher", **teacher)
    run_stage("teacher")
    run_stage("soft_targets")
    for view in range(2):
        rows = opened().gather(view, np.arange(36)).logits
        assert np.array_equal(rows, logits["train"][view].astype(np.float16))
    change_params("views", count=2)
    message = "has 1 pair of views of the training images, but `views.count` is 2. Set it to 1, or"
    with pytest.raises(UserError, match=message):
        run_stage("soft_targets")
    for changes in ({"count": 3}, {"count": 1}):
        change_params("views", rand_augment="none", **changes)
        with pytest.raises(UserError, match="was written for view policy weak=") as raised:
            run_stage("soft_targets")
        assert "Set it to" not in str(raised.value)
