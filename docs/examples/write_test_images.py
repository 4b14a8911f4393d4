"""Write test images of the prepared dataset as files, to try `predict` on.

    python -m docs.examples.write_test_images FOLDER [NUMBER]

Each file's name begins with its number in the test set and ends with its class.
"""

import sys
from pathlib import Path

from PIL import Image

from pipeline.data.prepared.dataset import EncodedSplit, open_dataset


def main() -> None:
    folder, number = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4
    dataset = open_dataset()
    split = dataset.splits["test"]
    folder.mkdir(parents=True, exist_ok=True)
    for sample in range(min(number, len(split))):
        name = f"{sample}_{Path(dataset.class_names[split.labels[sample]]).name}"
        if isinstance(split, EncodedSplit):
            (folder / f"{name}.jpg").write_bytes(split.content(sample))
        else:
            pixels = split.images[sample].transpose(1, 2, 0).squeeze()  # [H, W, 3], or [H, W]
            Image.fromarray(pixels).save(folder / f"{name}.png")


if __name__ == "__main__":
    main()
