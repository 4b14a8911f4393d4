"""Make wrong input of every kind from a finished project and a random generator.

Each function changes or adds files in the project of the current folder.
"""

import contextlib
import io
import json
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import yaml
from google.protobuf import json_format
from PIL import Image
from safetensors.torch import save as safetensors_bytes

CANARY = "executed"  # a file that exists if any input was executed
_FORMATS = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "TGA", "ICO"]
_MODES = ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "I;16", "I", "F", "YCbCr"]
_NUMBERS = (0, 1, -1, 3, 10**30, -(2**63), 1e308, float("nan"), float("inf"), 1e-320)
_TEXTS = ("", "x", "none", "x" * 9999, "../..", "-rf", "\0", "ä\u0308\u202e", ".", "a\nb", "${x}")
_NESTED = ([], {}, [[]], [None], {"": None}, {"a": {"b": [1]}}, [1, "a"], list(range(999)))
_ODD: tuple[Any, ...] = (None, True, False, *_NUMBERS, *_TEXTS, *_NESTED)


class Executed:
    """Pickled as a call that leaves a file behind."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return (Path.touch, (Path(CANARY),))


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Change, move, remove or add some of the bytes."""
    start = rng.randrange(len(content) or 1)
    end = start + rng.choice((1, 2, 4, 8, 64, 1024))
    before, run, after = content[:start], content[start:end], content[end:]
    if content and rng.random() < 0.4:
        data = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 3, 16))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    return rng.choice(
        (
            before,
            before + bytes(len(run)) + after,
            before + rng.randbytes(len(run)) + after,
            before + b"\xff" * len(run) + after,
            before + after,
            before + run * rng.choice((2, 4)) + after,
            content + rng.randbytes(rng.choice((1, 99))),
            rng.choice((b"", b"\0" * 999, b"text\n", rng.randbytes(500))),
        )
    )


def altered(rng: random.Random, value: Any, odd: Sequence[Any] = _ODD) -> Any:
    """Replace, rename, remove or repeat one part of a nested value."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, copy = rng.choice(keys), value.copy()
        match rng.randrange(8):
            case 0:
                del copy[key]
            case 1 if isinstance(copy, dict):
                name = rng.choice((f"{key}x", str(key)[:-1], 3, "", "format_version"))
                copy[name] = copy.pop(key)
            case 1:
                copy.append(copy[key])
            case 2:
                copy[key] = copy[rng.choice(keys)]
            case _:
                copy[key] = altered(rng, copy[key], odd)
        return copy
    if type(value) in (int, float) and rng.random() < 0.3:
        return value * rng.choice((-1, 2, 0.5, 1e6)) + rng.choice((0, 1))
    return rng.choice(odd)


def a_file(rng: random.Random, *folders: str) -> Path:
    found = (path for folder in folders for path in Path(folder).rglob("*") if path.is_file())
    return rng.choice(sorted(found))


def change_a_file(rng: random.Random, *folders: str) -> None:
    """Damage a file, alter its values, or remove, exchange, copy or link it."""
    path, chance = a_file(rng, *folders), rng.random()
    if path.suffix == ".json" and chance < 0.7:
        path.write_text(json.dumps(altered(rng, json.loads(path.read_text("utf-8")))), "utf-8")
        return
    if chance < 0.9:
        path.write_bytes(damaged(rng, path.read_bytes()))
        return
    other = a_file(rng, *folders)
    content = other.read_bytes()
    match rng.randrange(6):
        case 0:
            path.unlink()
        case 1:
            path.rename(path.with_name(f"{path.name} other"))
        case 2:
            path.write_bytes(content)
        case 3:
            path.unlink()
            path.mkdir()
        case 4:
            path.unlink()
            path.symlink_to(rng.choice(("/dev/zero", "nowhere", path.name, other.absolute())))
        case _:
            path.with_name(f"-{path.name}").write_bytes(content)


def params(rng: random.Random) -> None:
    path = Path("params.yaml")
    text, chance = path.read_text("utf-8"), rng.random()
    if chance < 0.6:
        content = yaml.safe_load(text)
        for _ in range(rng.choice((1, 1, 1, 3))):
            content = altered(rng, content)
        path.write_text(yaml.dump(content, sort_keys=False, allow_unicode=rng.random() < 0.5))
    elif chance < 0.8:
        path.write_bytes(damaged(rng, text.encode()))
    else:
        aliases = (f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 12))
        tags = ("int x", "binary x", "set {a}", f"python/object/apply:os.system ['touch {CANARY}']")
        odd = (
            *(f"{text}b0: &b0 [x, x]\n{''.join(aliases)}", "a: &a {b: *a}\n", "[" * 5000),
            *(f"{text}---\n{text}", text + text, "a: 2024-13-45\n", f"a: {'9' * 5000}\n"),
            *(f"{text}a: !!{tag}\n" for tag in tags),
        )
        path.write_bytes(rng.choice(odd).encode(rng.choice(("utf-8", "utf-16"))))


def an_image(rng: random.Random) -> tuple[bytes, str]:
    """An image's bytes, of any mode, format and size, some with several pages; and its format."""
    size = rng.choice(((16, 16), (1, 1), (1, 200), (300, 2), (40, 31)))
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (*size, 3), np.uint8)
    mode, form = rng.choice(_MODES), rng.choice(_FORMATS)
    image = Image.fromarray(pixels).convert("I" if mode == "I;16" else mode)
    exif = Image.Exif()
    exif[0x0112] = rng.choice((1, 3, 6, 8, 9, 0, 65535))  # orientation
    exif[0x010E] = "x" * rng.choice((1, 60_000))  # description
    options: dict[str, Any] = {"exif": exif} if rng.random() < 0.3 else {}
    if form == "AVIF":  # its writer, not its reader, crashes on odd images
        image = Image.fromarray(pixels).resize((48, 32))
    elif rng.random() < 0.15:
        options |= {"save_all": True, "append_images": [image.rotate(90, expand=False)]}
    file = io.BytesIO()
    try:
        image.save(file, form, **options)
    except (OSError, ValueError, KeyError):  # a mode that the format lacks
        file = io.BytesIO()
        image.convert("RGB").save(file, form := "PNG")
    return file.getvalue(), form


def png_of_any_size(width: int, height: int) -> bytes:
    """A PNG with this size in its header, and few pixels."""
    parts = []
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 99)), (b"IEND", b"")):
        body = kind + content
        parts.append(struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def image(rng: random.Random) -> None:
    """Write one odd file into an image folder."""
    content, form = an_image(rng)
    chance = rng.random()
    if chance < 0.7:
        content = damaged(rng, content)
    elif chance < 0.8:
        content = png_of_any_size(*rng.choices((0, 1, 50_000, 2**31 - 1, 13_000), k=2))
    elif chance < 0.9:
        svg, starts = b"<svg><image href='/etc/passwd'/></svg>", (b"", b"BM", b"\xff\xd8\xff")
        content = rng.choice((b"%!PS-Adobe-3.0 EPSF-3.0\n(executed) (w) file\n", svg, *starts))
    suffix = rng.choice((form.lower(), "png", "jpg", "txt", ""))
    Path(f"images/train/ant/x.{suffix}").write_bytes(content)
    if rng.random() < 0.05:
        odd = Path("images/train/bee/000.png")
        odd.unlink()
        odd.symlink_to(rng.choice(("/dev/zero", "nowhere", "000.png", "..", "/etc")))


def names(rng: random.Random) -> None:
    """Rename folders and files to any name that this file system takes."""
    letters = "aZ09 -_.~'\"\\$&|;<>%#{}\t\nä\u0308é\u202e\U0001f98a\u3042\0*?"
    for _ in range(rng.choice((1, 2))):
        path = rng.choice(sorted(p for p in Path("images").rglob("*") if p != Path("images/train")))
        name = rng.choice(("-rf", "--help", "..x", "x..", " ", "a b", "é", "e\u0301", "ANT", "con"))
        if rng.random() < 0.6:
            name = "".join(rng.choices(letters, k=rng.choice((1, 5, 60))))
        try:
            path.rename(path.with_name(name))
        except (OSError, ValueError):
            continue
    if rng.random() < 0.1:
        Path("images/train/ant").mkdir(exist_ok=True)
        with open(b"images/train/ant/\xff\xfe.png", "wb") as file:
            file.write(an_image(rng)[0])


_MEMBERS = (
    *("../out.png", "/out.png", "train/ant/../../../out.png", "train/ant/./y.png", "a" * 300),
    *("train/ant/-rf.png", "train/ant/\U0001f98a.png", "\\..\\out.png", "train/ant/a b.png", "~/x"),
)
_ODD_OF_ZIP = {
    "flag_bits": (1,),  # marked as encrypted
    "file_size": (2**40, 0, 10),
    "compress_type": (0, 8, 12, 14, 99),
    "header_offset": (0, 10, 2**31),
    "external_attr": (0o120777 << 16,),  # a link
}
_ODD_OF_TAR = {
    "size": (2**34, 2**60, 1, 0),
    "type": (*(bytes([kind]) for kind in b"1234567VZ"),),  # links, devices, folders, pipes
    "pax_headers": ({"size": "-512"}, {"path": "../x"}, {"GNU.sparse.map": "0,1,2"}),
}


def archive(rng: random.Random) -> str:
    """Write an archive of the images, damaged or with an odd member; returns its path."""
    kind = rng.choice((".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".zip"))
    path, odd, name = Path(f"brought{kind}"), rng.random() < 0.5, rng.choice(_MEMBERS)
    content = rng.choice((an_image(rng)[0], b"/etc/passwd"))
    if kind == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as to:
            for file in sorted(Path("images").rglob("*.png")):
                to.write(file, file.relative_to("images"))
            if odd:
                to.writestr(name, content)
                _set_odd(rng, rng.choice(to.infolist()), _ODD_OF_ZIP)
    else:
        form = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
        with tarfile.open(path, f"w:{kind[5:]}", format=form) as to:
            to.add("images", ".")
            member = tarfile.TarInfo(name)
            member.size, member.linkname = len(content), rng.choice(("/etc/passwd", "../../x"))
            if odd:
                _set_odd(rng, member, _ODD_OF_TAR)
                with contextlib.suppress(ValueError, OSError):  # more than the format can hold
                    to.addfile(member, io.BytesIO(content))
    if not odd:
        path.write_bytes(damaged(rng, path.read_bytes()))
    elif rng.random() < 0.1:
        return str(path.rename(f"brought{rng.choice(('.tar', '.zip', '.rar', '.tar.gz'))}"))
    return str(path)


def _set_odd(rng: random.Random, member: Any, odd: dict[str, tuple]) -> None:
    name = rng.choice((*odd, None))
    if name is not None:
        setattr(member, name, rng.choice(odd[name]))


def checkpoint(rng: random.Random) -> Path:
    """Write a file of weights for the students' network."""
    state = torch.load("state.pth", weights_only=True)
    path, chance = Path("brought.pth"), rng.random()
    if chance < 0.3:
        path.write_bytes(damaged(rng, _saved(rng, state)))
    elif chance < 0.6:
        path = Path("brought.safetensors")
        change = rng.choice((damaged, _lying_header))
        path.write_bytes(change(rng, safetensors_bytes(state)))
    elif chance < 0.65:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as to:
            to.writestr("archive/data.pkl", b"\0" * 50_000_000)
    else:
        odd = altered(rng, dict(state), _odd_values(rng.choice(list(state.values()))))
        wrapped = rng.choice((odd, odd, {"model": odd}, {"a": state, "b": odd}, Executed()))
        path.write_bytes(
            _saved(rng, wrapped) if rng.random() < 0.8 else pickle.dumps(wrapped, rng.randrange(6))
        )
    return path


def _odd_values(tensor: torch.Tensor) -> list[Any]:
    plain, ladder = tensor.float(), {"x": 1}
    for _ in range(60):
        ladder = {"a": ladder, "b": ladder}
    types = (torch.half, torch.int8, torch.bool, torch.cdouble, torch.double)
    return [
        *(plain.to(dtype) for dtype in types),
        *(plain * torch.nan, plain[None], plain.flatten()[:0], plain.to("meta")),
        *(plain.reshape(-1)[:1].expand(2**40), plain.to_sparse()),
        *(ladder, Executed(), 3, "text", None, {}),
    ]


def _saved(rng: random.Random, content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.7)
    return file.getvalue()


def _lying_header(rng: random.Random, content: bytes) -> bytes:
    """safetensors with a wrong JSON header."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.dumps(altered(rng, json.loads(content[8 : 8 + size]))).encode()
    length = rng.choice((len(header), len(header), len(header), 2**63, 0, len(header) + 9))
    return struct.pack("<Q", length) + header + content[8 + size :]


def onnx_file(rng: random.Random, path: Path) -> Path:
    """Change some bytes of an ONNX file, a value of its metadata, or a part of its graph."""
    content, chance = path.read_bytes(), rng.random()
    model = onnx.load_from_string(content)
    if chance < 0.25 and model.metadata_props:
        entry = rng.choice(model.metadata_props)
        with contextlib.suppress(ValueError):  # a text, not JSON
            entry.value = json.dumps(altered(rng, json.loads(entry.value)))
    elif chance < 0.5:
        try:
            parts = altered(rng, json_format.MessageToDict(model))
            model = json_format.ParseDict(parts, onnx.ModelProto())
        except (json_format.ParseError, ValueError, TypeError, AttributeError):
            model.graph.node[0].op_type = rng.choice(("Softmax", "Loop", "If", "NoSuch", ""))
    if chance < 0.5:
        path.write_bytes(model.SerializeToString())
    else:
        path.write_bytes(damaged(rng, content))
    return path
