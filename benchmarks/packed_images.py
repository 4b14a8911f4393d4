"""Pack the prepared images of a project into files that travel one by one, and unpack them.

    python -m benchmarks.packed_images PROJECT FOLDER    # writes FOLDER/part-1-of-2, ...

For a machine without a network that takes files of a limited size: `benchmarks.gpu --tables` there
unpacks them. Unpacked files equal those that `prepare` wrote, and its fingerprint is checked.
Columns of images are lossless WebP: CIFAR-100, 184 MB of pixels, takes 100 MB, two parts. (xz of
predicted residuals takes as much.)
"""

from pipeline.runtime.command import run_command

import argparse
import io
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.prepared.dataset import open_dataset, verify_dataset
from pipeline.runtime.errors import UserError
from pipeline.runtime.files import atomic_directory
from pipeline.runtime.outputs import PREPARED

PART_BYTES = 60 * 2**20
_PARAMS = "params.yaml"
_LONGEST = 16383  # pixels, of a side of a WebP


def pack(project: Path, folder: Path, part_bytes: int = PART_BYTES) -> list[Path]:
    """Write params.yaml and the prepared images of a project to a new folder, in equal parts.

    Args:
        part_bytes: at most.

    Raises:
        UserError: the images are no pixels of three channels.
    """
    dataset, content = open_dataset(project / PREPARED), io.BytesIO()
    if dataset.encoded or dataset.channels != 3:
        raise UserError(
            f"`{project / PREPARED}` holds other images; expected `dataset.storage: pixels` and "
            "`channels: 3`."
        )
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.write(project / _PARAMS, _PARAMS)
        for path in sorted((project / PREPARED).iterdir()):
            if not path.name.endswith("_images.npy"):
                packed.write(path, path.name)
        for name, split in dataset.splits.items():
            for rows in _columns(len(split), dataset.image_size):
                column = np.concatenate(split.images[rows].transpose(0, 2, 3, 1))
                webp = io.BytesIO()
                Image.fromarray(column).save(webp, "WEBP", lossless=True)
                packed.writestr(f"{name}/{rows.start}.webp", webp.getvalue())
    count = -(-content.tell() // part_bytes)
    parts = np.array_split(np.frombuffer(content.getbuffer(), np.uint8), count)
    folder.mkdir(parents=True)
    paths = [folder / f"part-{number}-of-{count}" for number in range(1, count + 1)]
    for path, part in zip(paths, parts, strict=True):
        path.write_bytes(part)
    return paths


def unpack(folder: Path, project: Path) -> None:
    """Write the project that was packed: its params.yaml and prepared images, bit for bit.

    Raises:
        UserError: a part is missing or damaged.
    """
    found = {path.name: path for path in folder.glob("part-*-of-*")}
    totals = {name.rsplit("-", 1)[1] for name in found}
    names = [f"part-{n}-of-{total}" for total in totals for n in range(1, int(total) + 1)]
    if len(totals) != 1 or set(names) != found.keys():
        raise UserError(
            f"`{folder}` holds {', '.join(sorted(found)) or 'no part'}; expected all parts of one "
            "`python -m benchmarks.packed_images PROJECT FOLDER`. Copy them there."
        )
    content = io.BytesIO(b"".join(found[name].read_bytes() for name in names))
    (project / PREPARED).parent.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(content) as packed, atomic_directory(project / PREPARED) as target:
            _unpack(packed, target)
            shutil.move(target / _PARAMS, project / _PARAMS)
    except zipfile.BadZipFile as error:
        raise UserError(f"`{folder}` is damaged ({error}); copy its parts there again.") from None


def _unpack(packed: zipfile.ZipFile, target: Path) -> None:
    columns: dict[str, dict[int, np.ndarray]] = {}  # by split, then by the first image
    for name in packed.namelist():
        if not name.endswith(".webp"):
            packed.extract(name, target)
            continue
        split, start = name.removesuffix(".webp").split("/")
        column = np.asarray(Image.open(io.BytesIO(packed.read(name))))
        side = column.shape[1]
        images = column.reshape(-1, side, side, 3).transpose(0, 3, 1, 2)
        columns.setdefault(split, {})[int(start)] = images
    for split, found in columns.items():
        whole = np.concatenate([found[start] for start in sorted(found)])
        np.save(target / f"{split}_images.npy", whole)
    verify_dataset(target)


def _columns(count: int, side: int) -> Iterator[slice]:
    """The images of one WebP after another."""
    step = _LONGEST // side
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.packed_images",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("project", type=Path, help="a project in which `prepare` has run")
    parser.add_argument("folder", type=Path, help="a folder to be made, for the parts")
    arguments = parser.parse_args()
    for path in pack(arguments.project, arguments.folder):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_command(main)
