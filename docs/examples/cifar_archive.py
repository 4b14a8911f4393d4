"""Pack CIFAR-10 or CIFAR-100 as an archive that `dataset.source: image_folder` reads.

    python docs/examples/cifar_archive.py CIFAR100 data/raw/cifar100.tar.gz

torchvision downloads the dataset from its authors' page (170 MB) into data/raw/cifar/, or uses the
file in that folder. Every image becomes a PNG, `train/<class>/<number>.png` or `test/...`.
"""

import io
import sys
import tarfile

import numpy as np
from PIL import Image


def write_archive(path, splits):
    """Write an archive. `splits`: name -> (images [N, 32, 32, 3] uint8, labels, class names)."""
    with tarfile.open(path, "w:gz") as archive:
        for split, (images, labels, class_names) in splits.items():
            for number, (image, label) in enumerate(zip(images, labels, strict=True)):
                png = io.BytesIO()
                Image.fromarray(np.asarray(image)).save(png, "PNG")
                member = tarfile.TarInfo(f"{split}/{class_names[label]}/{number:05d}.png")
                member.size = png.tell()
                png.seek(0)
                archive.addfile(member, png)


def main():
    import torchvision  # noqa: PLC0415  (takes seconds)

    name, path = sys.argv[1:]
    source = getattr(torchvision.datasets, name)
    splits = {
        split: source("data/raw/cifar", train=split == "train", download=True)
        for split in ("train", "test")
    }
    write_archive(path, {k: (s.data, s.targets, s.classes) for k, s in splits.items()})


if __name__ == "__main__":
    main()
