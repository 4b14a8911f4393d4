"""Image files byte by byte, as cameras, scanners and editors write them, sound and damaged."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

PICTURE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)

#: How each EXIF orientation makes the stored image upright.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


def saved(form: str, picture: np.ndarray | Image.Image = PICTURE, **options: object) -> bytes:
    file = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(file, form, **options)
    return file.getvalue()


def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")


def orientation(number: int) -> bytes:
    return entry(274, 3, 1, struct.pack("<H", number))


def exif(*entries: bytes, tail: bytes = b"", head: bytes = b"II*\0\x08\0\0\0") -> bytes:
    """The EXIF of these entries; the tail begins 14 + 12 * len(entries) bytes after its start."""
    return head + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4) + tail


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    """A chunk of a PNG."""
    right = zlib.crc32(kind + data)
    return (
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", right if checksum is None else checksum)
    )


def png_with(*chunks: bytes, content: bytes | None = None, before: bytes = b"IDAT") -> bytes:
    content = content or saved("PNG")
    at = content.index(before) - 4
    return content[:at] + b"".join(chunks) + content[at:]


def segment(marker: int, data: bytes) -> bytes:
    """A segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def jpeg_with(*segments: bytes, content: bytes | None = None) -> bytes:
    content = content or saved("JPEG", quality=95)
    return content[:2] + b"".join(segments) + content[2:]


def deep_png(values: np.ndarray, colour: int, *chunks: bytes) -> bytes:
    """A PNG of 16 bits a channel.

    Args:
        values: [H, W, C].
        colour: the PNG's colour type: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA.
    """
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows))
    parts = [chunk(b"IHDR", header), *chunks, pixels, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(values: np.ndarray, bits: int, *extra: tuple[int, int, int, int], **tags: int) -> bytes:
    """An uncompressed TIFF.

    Args:
        values: [H, W] or [H, W, C]; of 12 bits, two values share three bytes.
        extra: tag, type, count and value of further entries.
        tags: `photometric`, `sample_format`, `planar`; `order`: 1 for big-endian.
    """
    order = ">" if tags.get("order") else "<"
    height, width = values.shape[:2]
    channels = values.shape[2] if values.ndim == 3 else 1
    if bits == 12:
        a, b = (values.reshape(-1, 2).astype(np.uint32)[:, n] for n in (0, 1))
        data = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()
    else:
        code = {1: "u", 2: "i", 3: "f"}[tags.get("sample_format", 1)]
        planes = values.transpose(2, 0, 1) if tags.get("planar") == 2 else values
        data = planes.astype(f"{order}{code}{bits // 8}").tobytes()
    entries = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, 1, bits),
        (259, 3, 1, 1),
        (262, 3, 1, tags.get("photometric", 1 if channels == 1 else 2)),
        (273, 4, 1, 8),
        (277, 3, 1, channels),
        (278, 3, 1, height),
        (279, 4, 1, len(data)),
        (284, 3, 1, tags.get("planar", 1)),
        (339, 3, 1, tags.get("sample_format", 1)),
        *extra,
    ]
    start = 8 + len(data) + len(data) % 2
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in sorted(entries):
        packed = struct.pack(f"{order}{'H' if kind == 3 else 'I'}", value).ljust(4, b"\0")
        directory += struct.pack(f"{order}HHI", tag, kind, count) + packed
    head = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HI", 42, start)
    return head + data.ljust(start - 8, b"\0") + directory + bytes(4)
