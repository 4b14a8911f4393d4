"""Read a file of weights, whatever its name is. No code of it is executed."""

import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from pipeline.initial_weights import torch_file
from pipeline.runtime.errors import UserError, first_line
from pipeline.runtime.files import START_BYTES, describe_text

_EXPECTED = (
    "Expected a PyTorch checkpoint (.pt, .pth, .th, .ckpt, .bin) or safetensors; a .onnx file "
    "needs `family: onnx`."
)
_EXPORT = (
    "Export the model to ONNX, and set `family: onnx` (docs/teachers.md, section An ONNX file)."
)

#: The first bytes of files of other kinds, and what they are.
_KINDS = {
    rb"\x89HDF\r\n\x1a\n": f"an HDF5 file, as Keras writes. {_EXPORT}",
    rb"\x08[\x01-\x20][\x12\x1a\x22\x2a\x32\x3a\x42]": (  # ir_version, and a field
        f"an ONNX file, or another protocol buffer. If it is ONNX, name it .onnx. {_EXPORT}"
    ),
    rb".{4}TFL3": f"a TensorFlow Lite model. {_EXPORT}",
    rb"\x93NUMPY": f"an array of NumPy. {_EXPECTED}",
    rb"\x1f\x8b|BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd": "a compressed file. Unpack it.",
    rb"PK\x03\x04": "a zip archive without its end: it is cut short. Copy or download it again.",
    rb"7z\xbc\xaf\x27\x1c|Rar!": "a compressed archive. Unpack it.",
}

_MAGIC_OF_PROTOCOL_0 = f"L{torch_file.LEGACY_MAGIC}L".encode()  # the one pickle of text


def read_checkpoint(path: Path) -> Any:
    """Read a file as nested mappings and sequences, whose leaves are tensors (of torch, or
    `torch_file.StoredTensor`), numbers, texts and what `torch_file` keeps of other objects.

    Raises:
        UserError: it is a file of another kind, which the message names, or damaged.
    """
    with path.open("rb") as file:
        start = file.read(START_BYTES)
    size = path.stat().st_size
    try:
        if _is_safetensors(path, start, size):
            return load_file(path)
        if zipfile.is_zipfile(path):
            _check_zip(path, size)
            return torch_file.read_zip(path)
        if other := _other_kind(path, start):
            raise UserError(f"`{path}` is {other}")
        return torch_file.read_sequence(path)
    except UserError:
        raise
    except Exception as error:  # those of damaged checkpoints share no class
        raise UserError(
            f"`{path}` is not a checkpoint that can be read ({first_line(error)}). {_EXPECTED}"
        ) from None


def _is_safetensors(path: Path, start: bytes, size: int) -> bool:
    """Whether it begins with the length of a JSON header and the header."""
    fits = int.from_bytes(start[:8], "little") <= size or path.suffix == ".safetensors"
    return start[8:9] == b"{" and fits


def _check_zip(path: Path, size: int) -> None:
    """Raise for a zip that torch.save does not write."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    names = [part.filename for part in parts]
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        read = (p.file_size for p in parts if re.search(r"(^|/)(data\.pkl$|data/)", p.filename))
        if (unpacked := sum(read)) > size:
            raise ValueError(
                f"it unpacks to {unpacked:,} bytes; expected at most its size, {size:,}"
            )
        return
    if "model.weights.h5" in names:
        raise UserError(f"`{path}` is a model of Keras. {_EXPORT}")
    if names and all(name.endswith(".npy") for name in names):
        raise UserError(f"`{path}` is a file of NumPy arrays (.npz). {_EXPECTED}")
    noun = "file" if len(names) == 1 else "files"
    shown = ", ".join(f"`{name[:60]}`" for name in names[:3])
    raise UserError(
        f"`{path}` is a zip archive of {len(names)} {noun} ({shown}). Unpack it, and name "
        "the file of weights in it."
    )


def _other_kind(path: Path, start: bytes) -> str | None:
    """What a file is that torch.save did not write, and what to do; None if torch.save may have."""
    if not start:
        return f"empty. Copy or download it again. {_EXPECTED}"
    for beginning, text in _KINDS.items():
        if re.match(beginning, start, re.DOTALL):
            return text
    if tarfile.is_tarfile(path):
        return (
            "a tar archive. Unpack it, and name the file of weights in it; "
            "if torch wrote it (until 2017), load and save it with a later torch."
        )
    return None if start.startswith(_MAGIC_OF_PROTOCOL_0) else describe_text(start)
