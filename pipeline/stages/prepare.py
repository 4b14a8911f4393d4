"""prepare: pack the dataset into few files that training reads at full speed.

Reads `dataset` of params.yaml and the source that it names. Writes data/prepared/: pixels, or, for
`storage: encoded`, the bytes of image files, one after another. Few images are in memory at a time.
"""

from pipeline.runtime.command import run_command

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.data.prepared.dataset import DatasetDescription
from pipeline.data.sources.data_quality import find_duplicates, findings
from pipeline.data.sources.image_folder import image_folder
from pipeline.data.sources.image_reading import LISTED
from pipeline.data.sources.mnist_5k import mnist_5k
from pipeline.data.sources.near_copies import Sketches, find_near_copies
from pipeline.data.sources.packing import UNREADABLE_LIST, pack
from pipeline.data.sources.params import DatasetParams
from pipeline.data.sources.pixel_ranges import PixelRanges
from pipeline.data.sources.splits import hide_labels
from pipeline.data.sources.torchvision_datasets import torchvision_set
from pipeline.runtime.errors import counted
from pipeline.runtime.files import atomic_directory, write_json
from pipeline.runtime.locks import exclusive
from pipeline.runtime.outputs import PREPARED
from pipeline.runtime.params import load_section
from pipeline.runtime.stage_inputs import StageInputs

SCRATCH = Path(".scratch/prepare")  # holds only its lock
SOURCES = {"mnist_5k": mnist_5k, "image_folder": image_folder, "torchvision": torchvision_set}


def write_dataset(params: DatasetParams, directory: Path) -> DatasetDescription:
    """Write the files of a prepared dataset into an empty directory."""
    source = SOURCES[params.source](params)
    ranges = PixelRanges(params, source.samples.ids)
    sketches = Sketches(len(source.samples.ids))
    samples = hide_labels(source.samples, params)
    if hidden := np.count_nonzero(samples.labels != source.samples.labels):
        number = counted(hidden, "label of a training image is", "labels of training images are")
        key = f"`dataset.labels_per_class: {params.labels_per_class}`"
        print(f"prepare: {number} hidden ({key}; null keeps all)", flush=True)
    source = replace(source, samples=samples, images=sketches.watch(ranges.watch(source.images)))
    packed = pack(source, params, directory)
    source = replace(source, samples=packed.samples)
    duplicates = find_duplicates(packed.samples, packed.digests)
    duplicates |= find_near_copies(packed.samples, sketches.rows, packed.digests)
    description = packed.description.model_copy(update={"duplicates": duplicates or None})
    write_json(directory / "dataset.json", description.model_dump(exclude_none=True))
    if packed.unreadable:
        listed = [f"  {name}: {problem}" for name, problem in packed.unreadable.items()][:LISTED]
        print(
            f"prepare: files left out, as they are not images that can be read "
            f"(`dataset.unreadable: skip`): {len(packed.unreadable):,}. "
            f"`{PREPARED / UNREADABLE_LIST}` has all:\n" + "\n".join(listed),
            flush=True,
        )
    for line in [*ranges.findings(description.mean), *findings(source, duplicates)]:
        print(f"prepare: {line}", flush=True)
    return description


def main() -> None:
    argparse.ArgumentParser("python -m pipeline.stages.prepare", description=__doc__).parse_args()
    params = load_section(DatasetParams, "dataset")
    downloads = Path(params.root) if params.source == "torchvision" else None
    inputs = StageInputs("prepare", exclude=downloads)
    with exclusive(SCRATCH), atomic_directory(PREPARED) as directory:
        description = write_dataset(params, directory)
        inputs.check()
    *counts, (last, number) = description.splits.items()
    images = [f"{count:,} {split}" for split, count in counts] + [counted(number, f"{last} image")]
    classes = counted(len(description.class_names), "class")
    print(f"{PREPARED}: {', '.join(images)} of {classes}, {description.fingerprint[:12]}")


if __name__ == "__main__":
    run_command(main)
