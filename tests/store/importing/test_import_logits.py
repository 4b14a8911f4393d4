"""A table of logits becomes an ordinary store, or is refused with the reason."""

import json
import pickle
from pathlib import Path
from textwrap import dedent
from unicodedata import normalize

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import bytes_of, memory_left, prepare, take_as_prepared, write_images
from import_closure import ROOT
from logit_tables import (
    WRITERS,
    import_table,
    made_up_logits,
    table,
    write_h5,
    write_npz,
    write_text,
)

from pipeline.commands import import_logits
from pipeline.data.prepared.dataset import open_dataset
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import read_json
from pipeline.store.importing.rows import match
from pipeline.store.importing.table import read_table
from pipeline.store.reading.index import read_index
from pipeline.store.reading.store import open_shards
from pipeline.store.reading.verification import differences


def rows_of(store: str, split: str = "train") -> np.ndarray:
    """[views, N, C] float16, every byte verified by the store's own reader."""
    index = read_index(Path(store))
    assert list(differences(Path(store), index, open_dataset())) == []
    opened = open_shards(Path(store), index, {})
    views = range(index.num_views if split == "train" else 1)
    samples = np.arange(index.split_sizes[split])
    return np.stack([opened.gather(view, samples, split=split).logits for view in views])


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_of_a_table_becomes_the_same_store(project, form):
    logits = made_up_logits()
    store = import_table(WRITERS[form](table(logits)))
    for split, expected in logits.items():
        assert rows_of(store, split).tobytes() == expected.astype(np.float16).tobytes()


@pytest.mark.parametrize("suffix", ["npy", "pt"])
def test_a_bare_array_is_taken_in_the_order_of_the_prepared_images(project, capsys, suffix):
    logits = made_up_logits()
    everything = np.concatenate([of_split[0] for of_split in logits.values()])
    path = f"mine.{suffix}"
    if suffix == "npy":
        np.save(path, everything)
    else:
        torch.save(torch.from_numpy(everything), path)
    store = import_table(path)
    assert "no ids: its rows were taken in the order of data/prepared" in capsys.readouterr().out
    for split, expected in logits.items():
        assert np.array_equal(rows_of(store, split)[0], expected[0].astype(np.float16))
    np.save("mine.npy", everything[1:])
    with pytest.raises(
        UserError,
        match=r"float32 \[59, 3\] without ids; expected numbers \[60, 3\]: a row for each image of "
        r"data/prepared \(36 of train \+ 12 of validation \+ 12 of test\)",
    ):
        import_table("mine.npy")


def test_a_table_without_views_becomes_a_store_of_images_without_augmentation(project, capsys):
    logits = made_up_logits()
    store = import_table(write_text("mine.csv", table(logits, by_view=False)))
    assert "one row per image, which is used for every view of it" in capsys.readouterr().out
    index = read_index(Path(store))
    assert (index.policy, index.num_views) == ("none", 1)
    assert np.array_equal(rows_of(store)[0], logits["train"][0].astype(np.float16))


def test_rows_may_come_in_any_order_and_beside_those_of_other_images(project, capsys):
    arrays = table(made_up_logits())
    expected = rows_of(import_table(write_npz(arrays)))
    order = np.argsort(arrays["ids"], kind="stable")
    more = {
        name: array if name == "class_names" else array[order] for name, array in arrays.items()
    }
    for name, extra in (("ids", "strange.png"), ("splits", "train"), ("views", 9)):
        more[name] = np.append(more[name], extra)
    more["logits"] = np.concatenate([more["logits"], [[np.nan] * 3]])
    capsys.readouterr()
    assert np.array_equal(rows_of(import_table(write_npz(more))), expected)
    assert "1 row is of no image of data/prepared: `strange.png`" in capsys.readouterr().out


def without_rows(choose):
    def change(arrays):
        rows = choose(arrays)
        return {k: v if k == "class_names" else np.delete(v, rows, 0) for k, v in arrays.items()}

    return change


def repeat_first(arrays):
    first = {name: array[:1] for name, array in arrays.items() if name != "class_names"}
    return arrays | {name: np.concatenate([arrays[name], row]) for name, row in first.items()}


def with_number(number: float):
    def change(arrays):
        logits = arrays["logits"].astype(np.float64)
        logits[np.flatnonzero(arrays["views"] == 2)[:5], 1] = number  # of `ant`
        return arrays | {"logits": logits}

    return change


def a_view_of_the_first_image(arrays):
    first = arrays["ids"] == open_dataset().splits["train"].sample_ids[0]
    return np.flatnonzero(first & (arrays["views"] == 1))


REFUSED = {
    "no test": (
        without_rows(lambda a: np.flatnonzero(a["splits"] == "test")),
        r"has not one row for every image:\n  12 rows are missing of test, 12 images: "
        r"`train/ant/\d+.png`, `train/ant/\d+.png`, `train/ant/\d+.png` and 9 more\n"
        r"The ids are those of data/prepared/train_ids.json",
    ),
    "a view is missing": (
        without_rows(a_view_of_the_first_image),
        r"1 row is missing of train, 36 images in 3 views: `train/ant/\d+.png in view 1`\n",
    ),
    "other ids": (
        lambda a: a | {"ids": np.char.replace(a["ids"], "train/", "")},
        r"36 rows are missing of train, .*\n.*\n.*\n  132 rows are of no image of data/prepared: "
        r"`\w+/\d+.png`, ",
    ),
    "a row twice": (repeat_first, r"  1 row of \w+ is there twice: `train/\w+/\d+.png`\n"),
    "another class": (
        lambda a: a | {"class_names": np.array(["cat", "ant", "Bee"])},
        r"has logits for 3 classes: 1 of the 3 class folders are not among them \(`bee`; did "
        r"you mean `Bee`\?\), 1 are no class folder \(`Bee`\). Expected each class folder's",
    ),
    "a class twice": (
        lambda a: (
            a
            | {
                "class_names": np.append(a["class_names"], "ant"),
                "logits": a["logits"][:, [0, 1, 2, 2]],
            }
        ),
        r"has logits for 4 classes: .* Expected each class folder's name once.",
    ),
    "not a number": (
        with_number(np.nan),
        r"5 rows have numbers that are not finite, or beyond float16's ±65504; the first is "
        r"`train/\w+/\d+.png`: nan for `ant`. Expected finite logits.",
    ),
    "beyond float16": (with_number(-65520.0), "-65520 for `ant`"),
    "beyond float32": (with_number(1e300), "inf for `ant`"),
    "probabilities": (
        lambda a: a | {"logits": torch.from_numpy(a["logits"]).softmax(1).numpy()},
        "holds probabilities, which are not negative and add up to 1; expected logits. Save the "
        "input of the softmax, or",
    ),
    "percentages": (
        lambda a: a | {"logits": 100 * torch.from_numpy(a["logits"]).softmax(1).numpy()},
        r"`mine.npz` holds percentages, which are not negative and add up to 100; expected logits. "
        r".* One of the rows of `train/\w+/\d+.png`: \[[\d., e-]+\].",
    ),
    "hard labels": (
        lambda a: a | {"logits": np.eye(3, dtype=np.float32)[a["logits"].argmax(1)]},
        "holds hard labels, which are 0 or 1; expected logits.",
    ),
    "a sigmoid": (
        lambda a: a | {"logits": torch.from_numpy(a["logits"]).sigmoid().numpy()},
        "holds numbers from 0 to 1, as of a sigmoid",
    ),
    "a gap between views": (
        lambda a: a | {"views": np.where(a["views"] == 1, 5, a["views"])},
        "has the views `0`, `2`, `5` of train; expected 0, 1 and so on, none left",
    ),
    "views of test": (
        lambda a: a | {"views": np.where(a["splits"] == "test", 2, a["views"])},
        "12 rows of validation and test with a view; expected none, or 0: `train/",
    ),
    "no view": (
        lambda a: a | {"views": np.where(a["views"] == 2, -1, a["views"])},
        "36 rows of train without a view; expected numbers from 0: `train/",
    ),
    "an unknown split": (
        lambda a: a | {"splits": np.char.replace(a["splits"], "validation", "val")},
        "has the split `val`; expected `train`, `validation`, `test`.",
    ),
    "no rows": (
        without_rows(lambda a: slice(None)),
        r"has no rows; expected one for each of the 60 images.",
    ),
    "an array of another name": (
        lambda a: {"label" if k == "class_names" else k: v for k, v in a.items()},
        "has the arrays `ids`, `logits`, `label` and 2 more; expected `ids`, `logits` and",
    ),
    "fewer ids": (
        lambda a: a | {"ids": a["ids"][1:]},
        r"has ids <U\d+ \[131\] and logits \[132, 3\]; expected ids \[rows\] of text",
    ),
    "fewer columns": (
        lambda a: a | {"logits": a["logits"][:, :2]},
        r"has class_names <U\d+ \[3\] and logits \[132, 2\]; expected",
    ),
    "one number": (
        lambda a: a | {"logits": np.float32(1)},
        r"has logits float32 \[\] and logits \[\]; expected ids \[rows\] of text",
    ),
    "one column": (
        lambda a: a | {"logits": a["logits"][:, 0]},
        r"has logits float32 \[132\] and logits \[132\]; expected ids \[rows\] of text",
    ),
    "pickled ids": (
        lambda a: a | {"ids": a["ids"].astype(object)},
        "holds pickled objects, which could run code, and was not loaded. Save names and ids",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_table_that_is_not_for_this_dataset_is_refused(project, name):
    change, message = REFUSED[name]
    write_npz(change(table(made_up_logits())))
    with pytest.raises(UserError, match=message) as refusal:
        import_table("mine.npz")
    assert str(refusal.value).startswith("`mine.npz`")
    assert not Path("mine").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: "", "has the columns ; expected each once: `id`, one for each class"),
        (lambda t: t.replace("id,", "name,", 1), "has the columns `name`, `cat`, `ant`"),
        (lambda t: t.replace("cat", "ant", 1), "has the columns `id`, `ant`, `ant` and 1"),
        (lambda t: t.replace("\n", ",1\n").replace(",1", "", 1), "more fields than its fir"),
        (lambda t: t.replace(".png,", ".png,x", 1), "could not convert string to float"),
        (lambda t: t.rpartition(",")[0] + ",\n", "1 row has numbers .* nan for `bee`"),
        (lambda t: "\udcff" + t, r"cannot be read \('utf-8' codec .*a text in UTF-8"),
    ],
)
def test_a_text_that_is_no_table_is_refused(project, change, message):
    path = Path(write_text("mine.csv", table(made_up_logits(), by_view=False)))
    path.write_text(change(path.read_text("utf-8")), "utf-8", "surrogateescape")
    with pytest.raises(UserError, match=message) as refusal:
        import_table("mine.csv")
    assert str(refusal.value).startswith("`mine.csv`")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_ids_and_classes_of_a_text_may_have_delimiters_in_them(folder, delimiter):
    names = ["ant, black; red", "bee, honey, wild", "cat"]
    write_images(Path("images"), per_class=5)
    for old, new in zip(("ant", "bee", "cat"), names, strict=True):
        Path("images/train", old).rename(Path("images/train", new))
    dataset = prepare()
    logits = made_up_logits()
    write_text("mine.csv", table(logits, by_view=False), sep=delimiter)
    read = read_table(Path("mine.csv"), dataset)
    assert sorted(read.class_names) == names
    expected = table(logits, by_view=False)
    assert read.ids.tolist() == expected["ids"].tolist()
    np.testing.assert_allclose(read.logits, expected["logits"], rtol=1e-6)


@pytest.mark.parametrize("name", ["id", "split", "view"])
def test_a_class_with_the_name_of_a_column_cannot_be_in_a_text(folder, name):
    write_images(Path("images"), per_class=5)
    Path("images/train/bee").rename(f"images/train/{name}")
    dataset = prepare()
    arrays = table(made_up_logits(), by_view=False)
    Path("mine.csv").touch()
    message = (
        f"`mine.csv` is a text, in which the column `{name}` cannot be .* Save the table as .npz"
    )
    with pytest.raises(UserError, match=message):
        read_table(Path("mine.csv"), dataset)
    assert sorted(read_table(Path(write_npz(arrays)), dataset).class_names) == ["ant", "cat", name]


def test_views_of_a_text_are_numbers_or_for_validation_and_test_nothing(project):
    write_text("mine.csv", table(made_up_logits()))
    expected = rows_of(import_table("mine.csv"))
    frame = pd.read_csv("mine.csv", dtype=str)
    frame.loc[frame["split"] != "train", "view"] = ""
    frame.to_csv("mine.csv", index=False)
    assert np.array_equal(rows_of(import_table("mine.csv")), expected)
    frame.loc[5, "view"] = "1.5"
    frame.to_csv("mine.csv", index=False)
    with pytest.raises(UserError, match="`mine.csv` cannot be read \\(cannot safely cast"):
        import_table("mine.csv")


def test_names_that_look_the_same_are_refused_with_the_difference(folder):
    write_images(Path("images"), per_class=5)
    Path("images/train/ant").rename("images/train/caf\u00e9")
    dataset = prepare()
    arrays = table(made_up_logits(), by_view=False)
    for name, looks in (
        ("class_names", r"; 'caf\\xe9' and 'cafe\\u0301' look the same: one uses composed"),
        ("ids", r"; 'train/caf\\xe9/(\d+).png' and 'train/cafe\\u0301/\1.png' look the same"),
    ):
        decomposed = np.array([normalize("NFD", text) for text in arrays[name]])
        path = Path(write_npz(arrays | {name: decomposed}))
        with pytest.raises(UserError, match=looks):
            match(read_table(path, dataset), dataset)


def test_an_id_in_two_splits_needs_the_split(project):
    arrays = table(made_up_logits(), by_view=False)
    path = Path("data/prepared/test_ids.json")
    ids = read_json(path, produced_by="-")["sample_ids"]
    twin = open_dataset().splits["train"].sample_ids[0]
    old, ids[0] = ids[0], twin
    path.write_text(json.dumps({"sample_ids": ids}), "utf-8")
    take_as_prepared()
    arrays["ids"] = np.where(arrays["ids"] == old, twin, arrays["ids"])
    with pytest.raises(
        UserError, match=f"2 ids are in two splits: `{twin}`, .*add a column `split`"
    ):
        import_table(write_npz(arrays))


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


@pytest.mark.parametrize("suffix", ["npz", "npy", "pt", "h5"])
@pytest.mark.parametrize("content", [b"", pickle.dumps(Trap()), b"\x89HDF\r\n\x1a\n damaged"])
def test_a_file_of_another_kind_is_refused_and_runs_no_code(project, suffix, content):
    path = Path(f"mine.{suffix}")
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"`{path}` (cannot be read|holds pickled objects)"):
        import_table(str(path))
    assert not Path("trapped").exists()


def test_a_damaged_npz_is_refused(project):
    path = Path(write_npz(table(made_up_logits())))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match="`mine.npz` cannot be read .*Bad CRC-32"):
        import_table("mine.npz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("group", None, "cannot be read .`/group` is a group; expected arrays alone"),
        ("logits", h5py.Empty("f"), "cannot be read .`/logits` is empty; expected arrays alone"),
        ("ids", "a text", r"has ids <U6 \[\] and logits \[132, 3\]; expected ids \[rows\]"),
    ],
)
def test_what_hdf5_has_beside_arrays_is_refused(project, name, content, message):
    path = write_h5(table(made_up_logits()))
    with h5py.File(path, "a") as file:
        if content is None:
            file.create_group(name)
        else:
            del file[name]
            file[name] = content
    with pytest.raises(UserError, match=f"`mine.h5` {message}"):
        import_table(path)


def test_too_little_memory_is_no_fault_of_a_table(project):
    np.lib.format.open_memmap("mine.npy", "w+", np.float32, (60, 2**21))
    with memory_left(64 * 2**20), pytest.raises(MemoryError):
        import_table("mine.npy")


@pytest.mark.parametrize("path", ["mine.docx", "absent.npz"])
def test_what_is_no_table_is_refused(project, path):
    Path("mine.docx").touch()
    with pytest.raises(UserError, match=f"`{path}` is no table of logits; expected a file \\(.csv"):
        import_table(path)


def test_a_folder_of_something_else_is_not_replaced(project):
    path = write_npz(table(made_up_logits()))
    before = bytes_of(Path("models/teacher"))
    with pytest.raises(UserError, match="`models/teacher` holds something else than a store"):
        import_table(path, "models/teacher")
    assert bytes_of(Path("models/teacher")) == before
    with pytest.raises(UserError, match="`params.yaml` is a file; expected a new folder, or a"):
        import_table(path, "params.yaml")


def test_damaged_images_are_no_measure_of_a_table(project):
    path = write_npz(table(made_up_logits()))
    labels = Path("data/prepared/validation_labels.npy")
    np.save(labels, np.roll(np.load(labels), 1))
    with pytest.raises(UserError, match="`data/prepared` is damaged"):
        import_table(path)


def test_the_pages_python_writes_a_table(project):
    page = (ROOT / "docs/teachers.md").read_text("utf-8")
    block = page.partition("in the order of `class_names`:\n\n")[2].partition("\n\n- Rows")[0]
    logits, dataset = made_up_logits(), open_dataset()
    of_image = {
        sample_id: row
        for name, split in dataset.splits.items()
        for sample_id, row in zip(split.sample_ids, logits[name][0], strict=True)
    }
    exec(dedent(block), {"predict": of_image.get, "class_names": dataset.class_names})
    store = import_table("their_logits.npz")
    assert np.array_equal(rows_of(store, "test")[0], logits["test"][0].astype(np.float16))


@pytest.mark.parametrize("kind", [np.uint64, np.int8, np.uint8])
def test_views_of_any_integers_are_numbers_of_views(project, kind):
    logits = made_up_logits()
    logits["train"] = np.concatenate([logits["train"], -logits["train"]])  # 6 x 36 > 127
    arrays = table(logits)
    store = import_table(write_npz(arrays | {"views": arrays["views"].astype(kind)}))
    assert rows_of(store).tobytes() == logits["train"].astype(np.float16).tobytes()


def test_a_store_whose_index_cannot_be_read_is_not_replaced(project):
    path = write_npz(table(made_up_logits()))
    store = Path(import_table(path))
    (store / "store.json").write_text("{}", "utf-8")
    before = bytes_of(store)
    with pytest.raises(UserError, match=f"Remove `{store}`, or name a new folder.$"):
        import_table(path)
    assert bytes_of(store) == before


@pytest.mark.parametrize("form", ["npz", "h5"])
def test_a_folder_with_files_of_ones_own_is_not_replaced(project, form):
    """The table itself, too, which may have the suffix of a shard."""
    path = Path(WRITERS[form](table(made_up_logits())))
    store = Path(import_table(str(path)))
    mine = path.rename(store / path.name)
    before = bytes_of(store)
    message = f"something else than a store, `{path}`; expected a new"
    with pytest.raises(UserError, match=message):
        import_logits.import_logits(mine, store)
    assert bytes_of(store) == before
    import_table(str(mine.rename(path)))
