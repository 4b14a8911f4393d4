"""Remove from an image file what does not change its pixels, and read what does.

A damaged or unusual comment, profile or EXIF tag must not decide whether sound pixels are read. So
Pillow gets the parts that make the pixels, and no others; the orientation is read here, tolerantly.
Colour profiles and gamma are not applied, so they are removed, too.
"""

import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

#: What a file that shows more than one image gets.
ANIMATED = "it is animated; expected one image"

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_TIFF_ORDERS = {b"II": "<", b"MM": ">"}
_TIFF_VERSIONS = {42: ("H", "I"), 43: ("Q", "Q")}  # BigTIFF has longer counts and offsets

_SUBFILE, _SIZE, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION = 254, 256, 258, 259, 262, 274
_SAMPLES, _PLANAR, _SAMPLE_FORMAT, _XMP_TAG = 277, 284, 339, 700
_DECISIVE_TAGS = {
    *(_SUBFILE, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION),
    *(_SAMPLES, _PLANAR, _SAMPLE_FORMAT),
}
#: TIFF tags that say how pixels are stored: those of libtiff's codecs, and no descriptions.
_PIXEL_TAGS = {
    *(254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320),
    *(322, 323, 324, 325, 332, 338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521),
    *(529, 530, 531, 532),
}
#: EXIF's whole numbers: bytes, signed or not, of 2 and 4 bytes.
_WHOLE_NUMBERS = {3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}

_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)([0-9])")
_XMP_SEGMENT, _XMP_KEYWORD = b"http://ns.adobe.com/xap/1.0/\0", b"XML:com.adobe.xmp"
_RAW_PROFILE = b"Raw profile type exif"
_ANCILLARY = 0x20  # bit of the first letter of a PNG chunk that is not critical
_LARGEST_TEXT = 2**22  # bytes of a decompressed text; those that matter are far smaller


class Stripped(NamedTuple):
    """A file that makes the same pixels, without metadata."""

    content: bytes
    orientation: int | None = 1  # EXIF's, 1 to 8; None: not looked for
    white_is_zero: bool = False  # whether the decoded values are still to be inverted
    is_signed: bool = False  # whether bytes above 127 are negative
    more_pages: bool = False  # whether other pages follow that are not reduced copies


def strip(content: bytes) -> Stripped:
    """Remove the metadata of a JPEG, PNG, TIFF, AVIF or JPEG 2000; other files stay as they are.

    A part whose structure cannot be followed stays, too: its decoder decides about it.

    Raises:
        ValueError: an animated PNG, a PNG whose pixels do not match their checksum, or a TIFF that
            Pillow would decode wrongly.
    """
    try:
        if content.startswith(_JPEG):
            return _strip_jpeg(content)
        if content.startswith(_PNG):
            return _strip_png(content)
        if content[:2] in _TIFF_ORDERS:
            return _strip_tiff(content)
        if content[4:8] == b"ftyp":
            return _strip_avif(content)
        if content[4:8] == b"jP  ":
            return _strip_jpeg2000(content)
    except (struct.error, IndexError):
        pass  # cut short within a header
    return Stripped(content, None)


def find_orientation(exifs: Iterable[bytes], xmp: bytes | None) -> int:
    """Read the EXIF orientation, 1 to 8: that of EXIF, or of XMP if EXIF has none, or 1."""
    found = next((o for exif in exifs if (o := _exif_orientation(exif)) is not None), None)
    if found is None and xmp and (match := _XMP_ORIENTATION.search(xmp)):
        found = int(match[1])
    return found if found in range(1, 9) else 1


def _exif_orientation(exif: bytes) -> int | None:
    """Read the orientation of the first directory; None if it has none, or cannot be read."""
    exif = re.sub(rb"^(Exif\0\0){1,2}", b"", exif)
    order = _TIFF_ORDERS.get(exif[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", exif, entry)
            if tag == _ORIENTATION and kind in _WHOLE_NUMBERS and count:
                number = order + _WHOLE_NUMBERS[kind]
                at = entry + 8
                if count * struct.calcsize(number) > 4:
                    (at,) = struct.unpack_from(f"{order}I", exif, at)
                return struct.unpack_from(number, exif, at)[0]
    except struct.error:
        pass
    return None


def _strip_jpeg(content: bytes) -> Stripped:
    """Keep JFIF's and Adobe's segments, which say what the colours are, and none of the others."""
    kept, exifs, xmp = [], [], None
    position, kept_from = len(_JPEG), 0
    while (start := content.find(b"\xff", position)) >= 0:
        if start > position:  # bytes between segments
            kept.append(content[kept_from:position])
            position = kept_from = start
        marker = content[position + 1]
        if marker in (0xFF, 0x00):  # padding, and what is no marker
            position += 1
            continue
        if marker == 0xDA or 0xD0 <= marker <= 0xD9 or marker == 0x01:  # scan, or without length
            break
        length = content[position + 2] << 8 | content[position + 3]
        end = position + 2 + length
        if length < 2 or end > len(content):
            break
        if 0xE0 <= marker <= 0xEF or marker == 0xFE:
            data = content[position + 4 : end]
            if marker == 0xE1 and data.startswith(b"Exif\0\0"):
                exifs.append(data)
            elif marker == 0xE1 and data.startswith(_XMP_SEGMENT):
                xmp = data
            is_jfif = marker == 0xE0 and data.startswith(b"JFIF\0") and len(data) >= 14
            is_adobe = marker == 0xEE and data.startswith(b"Adobe") and len(data) >= 12
            if not (is_jfif or is_adobe):
                kept.append(content[kept_from:position])
                kept_from = end
        position = end
    if kept:
        content = b"".join([*kept, content[kept_from:]])
    # A long EXIF is continued in the next segment; a second one repeats the first.
    whole = b"".join(exif.removeprefix(b"Exif\0\0") for exif in exifs)
    return Stripped(content, find_orientation([whole, *exifs[1:]] if exifs else [], xmp))


def _strip_png(content: bytes) -> Stripped:
    """Keep critical chunks and tRNS, the transparency; verify their checksums."""
    view = memoryview(content)
    kept, texts, exif, counts = [], {}, b"", []
    has_pixels = first_is_frame = False
    position, kept_from, kind = len(_PNG), 0, b""
    for kind, end in _png_chunks(content):
        data = view[position + 8 : end - 4]
        is_kept = not kind[0] & _ANCILLARY or kind == b"tRNS"
        if is_kept:
            if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
                raise ValueError(f"its chunk {kind.decode()} does not match its checksum")
            has_pixels = has_pixels or kind == b"IDAT"
        elif kind == b"eXIf":
            exif = bytes(data)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, text = bytes(data).partition(b"\0")
            texts[keyword] = (kind, text)
        elif not has_pixels:
            counts += [int.from_bytes(data[:4])] if kind == b"acTL" else []
            first_is_frame = first_is_frame or kind == b"fcTL"
        if not is_kept:
            kept.append(view[kept_from:position])
            kept_from = end
        position = end
    if any(0 < count < 2**31 and count + (not first_is_frame) > 1 for count in counts):
        raise ValueError(ANIMATED)
    rest = view[position:]
    is_metadata = has_pixels and len(rest) > 4 and rest[4] & _ANCILLARY
    if is_metadata or (kind == b"IEND" and len(rest)):
        kept.append(view[kept_from:position])  # the rest is no image's, or metadata cut short
        kept_from = len(content)
    if kept:
        content = b"".join([*kept, view[kept_from:]])
    return Stripped(content, _png_orientation(exif, texts))


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield the kind and the end of each whole chunk, to the end of the image."""
    position, kind = len(_PNG), b""
    while position + 12 <= len(content) and kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, position)
        position += 12 + length
        if position > len(content) or not kind.isalpha():
            return
        yield kind, position


def _png_orientation(exif: bytes, texts: dict[bytes, tuple[bytes, bytes]]) -> int:
    """The orientation of EXIF, which may be a text, or of XMP.

    Args:
        texts: by keyword: the chunk's kind, and what follows the keyword.
    """
    if not exif and b"exif" in texts:
        exif = texts[b"exif"][1]
    if not exif and _RAW_PROFILE in texts:
        exif = _exif_of_raw_profile(_text(*texts[_RAW_PROFILE]))
    xmp = _text(*texts[_XMP_KEYWORD]) if _XMP_KEYWORD in texts else None
    return find_orientation([exif] if exif else [], xmp)


def _text(kind: bytes, text: bytes) -> bytes:
    """The text of a chunk, decompressed; empty if it is damaged.

    Args:
        text: what follows the keyword.
    """
    compressed = kind == b"zTXt"
    if compressed:
        text = text[1:]
    elif kind == b"iTXt":
        compressed = text[:1] != b"\0"
        text = b"".join(text[2:].split(b"\0", 2)[2:])  # after language and translated keyword
    if not compressed:
        return text
    try:
        return zlib.decompressobj().decompress(text, _LARGEST_TEXT)
    except zlib.error:
        return b""


def _exif_of_raw_profile(profile: bytes) -> bytes:
    """Decode ImageMagick's way of writing EXIF as text: two lines, a length, hexadecimal lines."""
    try:
        return bytes.fromhex(b"".join(profile.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


class _Tiff:
    """The directories of a TIFF, and the numbers in them."""

    def __init__(self, content: bytes):
        self.content, self.order = content, _TIFF_ORDERS[content[:2]]
        (version,) = struct.unpack_from(f"{self.order}H", content, 2)
        # Pillow reads a version in the other byte order, too.
        count, offset = _TIFF_VERSIONS.get(version, _TIFF_VERSIONS[42])
        self.count, self.offset = self.order + count, self.order + offset
        self.head = f"{self.order}HH{offset}"  # of an entry: tag, type, number of values
        self.offset_size = struct.calcsize(self.offset)
        self.entry_size = struct.calcsize(self.head) + self.offset_size
        (self.start,) = struct.unpack_from(self.offset, content, 8 if version == 43 else 4)

    def directory(self, start: int) -> tuple[dict[int, int], int]:
        """Find each tag's first entry, and the next directory; 0 if there is none."""
        (count,) = struct.unpack_from(self.count, self.content, start)
        first = start + struct.calcsize(self.count)
        end = first + min(count, 2**16) * self.entry_size  # a BigTIFF may claim more
        entries = {}
        last = min(end, len(self.content) - self.entry_size + 1)
        for entry in range(first, last, self.entry_size):
            (tag,) = struct.unpack_from(f"{self.order}H", self.content, entry)
            entries.setdefault(tag, entry)
        has_next = end + self.offset_size <= len(self.content)
        return entries, struct.unpack_from(self.offset, self.content, end)[0] if has_next else 0

    def values(self, entry: int) -> bytes:
        """The bytes of an entry's values."""
        _, kind, number = struct.unpack_from(self.head, self.content, entry)
        length = number * {1: 1, 2: 1, 3: 2, 4: 4, 7: 1, 16: 8}.get(kind, 0)
        at = entry + self.entry_size - self.offset_size
        if length > self.offset_size:
            (at,) = struct.unpack_from(self.offset, self.content, at)
        return self.content[at : at + length]

    def numbers(self, entries: dict[int, int]) -> dict[int, int]:
        """The first number of each tag that decides about pixels."""
        found = {}
        for tag in entries.keys() & _DECISIVE_TAGS:
            kind = struct.unpack_from(self.head, self.content, entries[tag])[1]
            code, data = {3: "H", 4: "I"}.get(kind), self.values(entries[tag])
            if code and len(data) >= struct.calcsize(code):
                found[tag] = struct.unpack_from(self.order + code, data)[0]
        return found


def _strip_tiff(content: bytes) -> Stripped:
    """Rewrite the first directory with the tags that make pixels, and without a next one.

    Deep images whose white is zero become such whose black is zero: Pillow would not invert them.
    """
    tiff = _Tiff(content)
    entries, next_start = tiff.directory(tiff.start)
    found = tiff.numbers(entries)
    bits = found.get(_BITS, 1)
    # Of these Pillow keeps the high bytes alone, or takes them for 8 bits.
    if bits > 8 and found.get(_PLANAR) == 2 and found.get(_SAMPLES, 1) > 1:
        raise ValueError("it has 16-bit channels one after another; expected them side by side")
    orientation = found.get(_ORIENTATION)
    if orientation is None:
        xmp = tiff.values(entries[_XMP_TAG]) if _XMP_TAG in entries else None
        orientation = find_orientation([], xmp)
    is_inverted = found.get(_PHOTOMETRIC) == 0 and bits > 8
    kept = [entry for tag, entry in entries.items() if tag in _PIXEL_TAGS]
    directory = [struct.pack(tiff.count, len(kept))]
    for entry in kept:
        raw = content[entry : entry + tiff.entry_size]
        if is_inverted and entry == entries[_PHOTOMETRIC]:
            one = struct.pack(f"{tiff.order}H", 1).ljust(tiff.offset_size, b"\0")
            raw = struct.pack(tiff.head, _PHOTOMETRIC, 3, 1) + one
        directory.append(raw)
    new = b"".join([*directory, struct.pack(tiff.offset, 0)])
    return Stripped(
        content[: tiff.start] + new + content[tiff.start + len(new) :],
        orientation=orientation if orientation in range(1, 9) else 1,
        white_is_zero=is_inverted,
        is_signed=bits == 8 and found.get(_SAMPLE_FORMAT) == 2,
        more_pages=next_start not in (0, tiff.start) and _is_full_page(tiff, next_start),
    )


def _is_full_page(tiff: _Tiff, start: int) -> bool:
    """Whether there is a page, and it is no reduced copy of another."""
    try:
        entries, _ = tiff.directory(start)
        return _SIZE in entries and not tiff.numbers(entries).get(_SUBFILE, 0) & 1
    except struct.error:
        return False


def _strip_avif(content: bytes) -> Stripped:
    """Rename the items with EXIF, and XMP beside it, so that nobody reads them.

    The orientation of an AVIF is a property of the image; Pillow reports it as EXIF.
    """
    changed, found = bytearray(content), []
    for start, end in _boxes(content, 0, len(content), b"meta"):
        for list_start, list_end in _boxes(content, start + 4, end, b"iinf"):
            first = list_start + (6 if content[list_start] == 0 else 8)
            for item, _ in _boxes(content, first, list_end, b"infe"):
                kind = item + 4 + (4 if content[item] < 3 else 6)
                if content[kind : kind + 4] in (b"Exif", b"mime"):
                    found.append(kind)
    if any(content[kind : kind + 4] == b"Exif" for kind in found):
        for kind in found:
            changed[kind : kind + 4] = b"free"
    return Stripped(bytes(changed), None)


def _strip_jpeg2000(content: bytes) -> Stripped:
    """Rename the boxes with a resolution. Pillow reads no other metadata of this format."""
    changed = bytearray(content)
    for start, end in _boxes(content, 0, len(content), b"jp2h"):
        for resolution, _ in _boxes(content, start, end, b"res "):
            changed[resolution - 4 : resolution] = b"free"
    return Stripped(bytes(changed))


def _boxes(content: bytes, start: int, end: int, wanted: bytes) -> Iterator[tuple[int, int]]:
    """Yield the start and end of the contents of each box of a kind."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", content, start)
        head = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", content, start + 8)
            head = 16
        elif size == 0:  # to the end
            size = end - start
        if size < head:
            return
        if kind == wanted:
            yield start + head, min(start + size, end)
        start += size
