"""Pack CIFAR-10 or CIFAR-100 as an archive that `dataset.source: image_folder` reads.

    python docs/examples/cifar_archive.py CIFAR100 data/raw/cifar100.tar.gz
    python docs/examples/cifar_archive.py CIFAR10 data/raw/cifar10.tar.gz 1000

torchvision downloads the dataset from its authors' page (170 MB) into data/raw/cifar/, or uses the
file in that folder. Every image becomes a PNG of its authors' name, `train/<class>/<name>.png` or
`test/...`. A number takes so many training images of each class, the first by name; all test images
stay.
"""

import io
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def write_archive(path, splits, train_per_class=None):
    """Write an archive. `splits`: name -> (images [N, 32, 32, 3] uint8, labels, class names,
    file names)."""
    with tarfile.open(path, "w:gz") as archive:
        for split, (images, labels, class_names, file_names) in splits.items():
            taken = dict.fromkeys(labels, 0)
            for number in sorted(range(len(images)), key=file_names.__getitem__):
                label = labels[number]
                taken[label] += 1
                if split == "train" and train_per_class and taken[label] > train_per_class:
                    continue
                png = io.BytesIO()
                Image.fromarray(np.asarray(images[number])).save(png, "PNG")
                member = tarfile.TarInfo(f"{split}/{class_names[label]}/{file_names[number]}")
                member.size = png.tell()
                png.seek(0)
                archive.addfile(member, png)


def read_file_names(source):
    """Read the authors' names of a dataset's images. torchvision has compared the files' MD5."""
    batches = source.train_list if source.train else source.test_list
    folder = Path(source.root) / source.base_folder
    return [
        name
        for batch, _ in batches
        for name in pickle.loads((folder / batch).read_bytes(), encoding="latin1")["filenames"]
    ]


def main():
    import torchvision  # noqa: PLC0415  (takes seconds)

    name, path, *train_per_class = sys.argv[1:]
    source = getattr(torchvision.datasets, name)
    splits = {
        split: source("data/raw/cifar", train=split == "train", download=True)
        for split in ("train", "test")
    }
    write_archive(
        path,
        {k: (s.data, s.targets, s.classes, read_file_names(s)) for k, s in splits.items()},
        *map(int, train_per_class),
    )


if __name__ == "__main__":
    main()
