"""A full or read-only disk gives one message and costs no output. No stage writes to DVC's cache,
even through a link."""

from pipeline.runtime.command import run_command

import errno
import hashlib
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from clone import Clone, committed
from conftest import PARAMS, change_params, run_stage, write_params

from pipeline.data.sources.packing import write_array
from pipeline.runtime import files
from pipeline.teacher import accuracy_gate

STAGES = {
    "prepare": (),
    "teacher": (),
    "soft_targets": (),
    "baseline": ("small",),
    "student": ("small",),
    "robustness": ("small",),
    "compare": (),
    "export": ("--teacher",),
}  # not `speed`, whose figures differ each time
OUTPUTS = ("data", "models", "predictions", "metrics", "reports")
DISK = 16 * 2**20  # bytes: enough for the whole project
#: Bytes left free, chosen so that each time another file is the first that does not fit.
FREE = dict.fromkeys(STAGES, (0, 2**12, 2**14, 2**15)) | {
    "prepare": (0, 2**13, 2**15, 2**15 + 2**14),  # the last: too little for memory maps
    "teacher": (0, 2**16, 800_000),  # a state takes 655,105 bytes
    "baseline": (0, 2**16, 1_100_000),  # a state with the best weights takes 985,859
    "student": (0, 2**16, 1_100_000),
    "robustness": (0,),  # its files take a page each
    "export": (2**15,),  # the graph does not fit
}


@pytest.fixture
def disk(finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The finished project on a small file system, as the current folder. Trainings take one
    epoch."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        shutil.copytree(finished_project, folder / "project")
        monkeypatch.chdir(folder / "project")
        monkeypatch.setattr(accuracy_gate, "check", lambda *_, **__: None)
        params = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
        params["training"]["epochs"] = params["teacher"]["training"]["epochs"] = 1
        write_params(Path(), params)
        yield folder
    finally:
        monkeypatch.undo()
        subprocess.run(["umount", str(folder)], check=True)


def outputs() -> dict[str, bytes]:
    paths = (path for folder in OUTPUTS for path in Path(folder).rglob("*"))
    return {str(path): path.read_bytes() for path in paths if path.is_file()}


def before_the_end(files: dict[str, bytes]) -> dict[str, bytes]:
    """As they are until a training ends: no epoch of its history is the kept one yet."""
    return {
        path: content.replace(b",True\n", b",False\n") if "/history/" in path else content
        for path, content in files.items()
    }


def refused(stage: str) -> str | None:
    """Run a stage; return its error message, or None if it succeeds."""
    try:
        run_command(lambda: run_stage(stage, *STAGES[stage]))
    except SystemExit as end:
        return str(end.code)
    return None


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_or_read_only_disk_is_reported_with_path_and_bytes_and_costs_no_output(disk, stage):
    run_stage(stage, *STAGES[stage])
    expected = outputs()
    for free in FREE[stage]:
        shutil.rmtree(".scratch", ignore_errors=True)
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - free))
        message = refused(stage)
        ballast.unlink()
        assert re.match(
            r"error: .*`[-\w./]+`.* needs? (more than )?[\d,]+ bytes.*[\d,]+ are free|"
            r"error: the soft targets need [\d,]+ bytes in `.scratch/soft_targets`",
            message or "no refusal",
        ), message
        assert before_the_end(outputs()) == before_the_end(expected)
        assert not list(Path().rglob("*.partial"))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    message = refused(stage)
    assert re.fullmatch(r"error: `[-\w./@]+`.*Read-only file system.* run again.*", message)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert refused(stage) is None
    assert outputs() == expected


@pytest.mark.parametrize("folder", ["models", "predictions", "metrics"])
def test_a_read_only_output_folder_is_reported_with_its_path_and_the_training_is_kept(
    disk, folder, capsys
):
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        message = refused("student")
    finally:
        subprocess.run(["umount", folder], check=True)
    assert re.match(rf"error: `{folder}/[-\w./]+` cannot be written \(Read-only file sys", message)
    capsys.readouterr()
    assert refused("student") is None
    assert "resumes after epoch 1 of 1" in capsys.readouterr().out


def test_an_array_has_the_bytes_that_numpy_writes(folder):
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    np.save("expected.npy", array)
    write_array(Path("array.npy"), array)
    assert Path("array.npy").read_bytes() == Path("expected.npy").read_bytes()


@pytest.fixture
def disk_events(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Each flush to disk and each rename from here on, with the inode of the file or folder."""
    events, flush, rename = [], os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append(("flush", os.fstat(descriptor).st_ino))
        flush(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append(("rename", os.stat(source).st_ino))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return events


def test_a_file_is_on_disk_before_it_replaces_another_and_so_is_its_new_name(disk_events):
    Path("file").write_bytes(b"before")
    files.write_bytes("file", b"after")
    file, folder = Path("file").stat().st_ino, Path().stat().st_ino
    assert disk_events == [("flush", file), ("rename", file), ("flush", folder)]


def test_a_folder_is_on_disk_with_its_files_before_it_replaces_another(disk_events):
    with files.atomic_directory("out") as partial:
        (partial / "deeper").mkdir()
        (partial / "deeper/file").write_bytes(b"content")
    inner = [path.stat().st_ino for path in (Path("out/deeper"), Path("out/deeper/file"))]
    out, parent = Path("out").stat().st_ino, Path().stat().st_ino
    *flushed, renamed, last = disk_events
    assert {*flushed} == {("flush", inode) for inode in (*inner, out)}
    assert (renamed, last) == (("rename", out), ("flush", parent))


def test_disk_space_is_allocated_before_a_memory_map_is_written(folder):
    path = Path("map.npy")
    np.lib.format.open_memmap(path, "w+", np.uint8, (2**20,))
    files.reserve(path)
    assert path.stat().st_blocks * 512 >= 2**20


def test_a_read_error_is_not_reported_as_a_write_error(folder):
    def read() -> None:
        with files.atomic_directory("out"):
            raise PermissionError(13, "Permission denied", "images/a.png")

    with pytest.raises(PermissionError, match="images/a.png"):
        read()


def test_a_folder_that_is_a_link_to_another_disk_stays_one(tmp_path):
    disk, link = tmp_path / "disk/store", tmp_path / "store"
    link.symlink_to(disk)  # which is not there yet
    for number in range(3):
        with files.atomic_directory(link) as folder:
            (folder / str(number)).touch()
        assert link.is_symlink()
        assert [path.name for path in disk.iterdir()] == [str(number)]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["2", "disk", "store", "store"]


def test_removing_a_link_leaves_what_it_leads_to(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    files.remove(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("killed", [False, True])
def test_a_folder_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch, killed):
    path, rename = tmp_path / "folder", os.replace
    with files.atomic_directory(path) as folder:
        (folder / "before").touch()

    def failing(source: Path, target: Path) -> None:
        if Path(target) == path and ".previous" not in str(source):
            raise SystemExit if killed else OSError(errno.EIO, "Input/output error")
        rename(source, target)

    def replace_again() -> None:
        with files.atomic_directory(path) as folder:
            (folder / "after").touch()

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing)
            with pytest.raises(
                SystemExit if killed else OSError, match=None if killed else "output"
            ):
                replace_again()
        assert path.exists() != killed
    with pytest.raises(KeyError), files.atomic_directory(path):
        raise KeyError  # a run that fails for another reason
    assert [file.name for file in path.iterdir()] == ["before"]
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def test_a_file_system_that_flushes_no_folders_suffices(tmp_path, monkeypatch):
    flush = os.fsync

    def files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    files.write_bytes(tmp_path / "folder/file", b"1")
    assert (tmp_path / "folder/file").read_bytes() == b"1"
    monkeypatch.setattr(os, "fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.write_bytes(tmp_path / "folder/other", b"1")


def test_a_message_has_no_temporary_names():
    path = Path("data/.out.partial/.a.npy.partial")
    refusal = str(files._disk_full(path, OSError(28, "No space left"), 7, exact=True))
    assert refusal.startswith("`data/out/a.npy` cannot be written (No space left). It needs 7 byt")


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which everything has run."""
    return committed(tmp_path_factory)


def damaged_objects(root: Path) -> list[Path]:
    """Objects of DVC's cache whose MD5 is not their name."""
    objects = [path for path in (root / ".dvc/cache/files/md5").rglob("*") if path.is_file()]
    assert len(objects) > 20
    return [
        path
        for path in objects
        if hashlib.md5(path.read_bytes()).hexdigest()
        != path.parent.name + path.name.removesuffix(".dir")
    ]


@pytest.mark.parametrize("kind", ["hardlink", pytest.param("symlink", marks=pytest.mark.slow)])
def test_no_stage_writes_through_a_link_into_dvcs_cache(linked, monkeypatch, kind):
    root = linked.root
    monkeypatch.chdir(root)
    write_params(root, PARAMS)
    linked.dvc("config", "cache.type", kind)
    linked.dvc("checkout", "--relink", "--force")
    for path in (*Path("data/soft_targets").iterdir(), *Path("models/teacher").iterdir()):
        assert path.is_symlink() if kind == "symlink" else path.stat().st_nlink > 1
    for stage, arguments in STAGES.items():
        run_stage(stage, *arguments)
    assert not damaged_objects(root)
    linked.dvc("checkout", "--relink", "--force")
    change_params("training", seeds={"hardlink": 31, "symlink": 32}[kind])
    assert linked.dvc_here("repro", "--single-item", "student@small").returncode == 0
    run_stage("student", "small")  # over links to the objects just cached
    assert not damaged_objects(root)
