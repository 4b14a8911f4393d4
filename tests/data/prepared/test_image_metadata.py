"""Metadata that do not change pixels never decide; those that do are applied, or refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from image_files import (
    PICTURE,
    UPRIGHT,
    chunk,
    deep_png,
    entry,
    exif,
    jpeg_with,
    orientation,
    png_with,
    saved,
    segment,
    tiff,
)
from PIL import Image, UnidentifiedImageError

from pipeline.data.prepared.deep_images import BitDepthError
from pipeline.data.prepared.image_decoding import (
    LARGEST,
    eight_bits,
    read_image,
    read_nothing_else,
)

EXIF = b"Exif\0\0"
RATIONAL_SOFTWARE = entry(305, 5, 1, struct.pack("<I", 38))
TEXT_RESOLUTION = entry(282, 2, 3, b"72\0")
TURNED = exif(orientation(6), RATIONAL_SOFTWARE, tail=struct.pack("<II", 1, 1))
MANY_ENTRIES = b"II*\0\x08\0\0\0\xff\xff" + orientation(6)  # it claims 65,535, and ends
FAR_TAG = exif(entry(270, 2, 2**31, struct.pack("<I", 2**31)), orientation(6))
XMP = b"http://ns.adobe.com/xap/1.0/\0"


def app1(data: bytes) -> bytes:
    return segment(0xE1, data)


def compressed(kind: bytes, head: bytes, size: int) -> bytes:
    return chunk(kind, head + zlib.compress(b"x" * size))


#: Sound pixels with metadata of all sorts, and their EXIF orientation.
JPEGS = {
    "an odd type of a tag": (jpeg_with(app1(EXIF + TURNED)), 6),
    "a text for a number": (jpeg_with(app1(EXIF + exif(orientation(6), TEXT_RESOLUTION))), 6),
    "more entries than there are": (jpeg_with(app1(EXIF + MANY_ENTRIES)), 6),
    "a tag that leads out of EXIF": (jpeg_with(app1(EXIF + FAR_TAG)), 6),
    "an orientation of 4 bytes": (
        jpeg_with(app1(EXIF + exif(entry(274, 4, 1, struct.pack("<I", 8))))),
        8,
    ),
    "a wrong version of EXIF": (
        jpeg_with(app1(EXIF + exif(orientation(6), head=b"IIxx\x08\0\0\0"))),
        6,
    ),
    "EXIF without its header": (jpeg_with(app1(EXIF + b"\0\x08\0\x02\x01\x12\0\x03")), 1),
    "empty EXIF": (jpeg_with(app1(EXIF)), 1),
    "EXIF with its header twice": (jpeg_with(app1(EXIF * 2 + TURNED)), 6),
    "EXIF twice": (jpeg_with(app1(EXIF + TURNED), app1(EXIF + TURNED)), 6),
    "damaged EXIF, then EXIF": (jpeg_with(app1(EXIF + b"II"), app1(EXIF + TURNED)), 6),
    "an unknown orientation": (jpeg_with(app1(EXIF + exif(orientation(99)))), 1),
    "garbage for XMP": (jpeg_with(app1(XMP + b"\xff\0<tiff:Orientation")), 1),
    "the orientation in XMP": (jpeg_with(app1(XMP + b'<x tiff:Orientation="6"/>')), 6),
    "a part of a profile": (jpeg_with(segment(0xE2, b"ICC_PROFILE\0")), 1),
    "a damaged index of pictures": (jpeg_with(segment(0xE2, b"MPF\0MM\0*\xff\xff\xff\xff")), 1),
    "a short JFIF segment": (jpeg_with(segment(0xE0, b"JFIF\0")), 1),
    "a short Adobe segment": (jpeg_with(segment(0xEE, b"Adobe")), 1),
    "damaged Photoshop data": (jpeg_with(segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed")), 1),
    "bytes between segments": (jpeg_with(b"\0\0", app1(EXIF + TURNED), b"\x11"), 6),
}
NO_HEADER = b"\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01"
PNGS = {
    "EXIF without its header": (png_with(chunk(b"eXIf", NO_HEADER)), 1),
    "an odd type of a tag": (png_with(chunk(b"eXIf", TURNED)), 6),
    "empty EXIF": (png_with(chunk(b"eXIf", b"")), 1),
    "a long text": (png_with(compressed(b"zTXt", b"workflow\0\0", 2_000_000)), 1),
    "much text": (png_with(*[chunk(b"tEXt", b"a\0" + b"x" * 2**20)] * 65), 1),
    "a large profile": (png_with(compressed(b"iCCP", b"p\0\0", 2_000_000)), 1),
    "a profile with an unknown compression": (png_with(chunk(b"iCCP", b"p\0\x07zz")), 1),
    "a text with a wrong checksum": (png_with(chunk(b"tEXt", b"a\0b", 0)), 1),
    "a text with an unknown compression": (png_with(chunk(b"zTXt", b"a\0\x07zz")), 1),
    "an international text that is not UTF-8": (
        png_with(chunk(b"iTXt", b"a\0\0\0\xff\0\xff\0\xff")),
        1,
    ),
    "a short gamma": (png_with(chunk(b"gAMA", b"\0")), 1),
    "short colours": (png_with(chunk(b"cHRM", b"\0"), chunk(b"sRGB", b""), chunk(b"pHYs", b"")), 1),
    "a text between pixels and end": (png_with(chunk(b"tEXt", b"a\0b", 0), before=b"IEND"), 1),
    "a text cut short at the end": (png_with(chunk(b"tEXt", b"a\0b"), before=b"IEND")[:-17], 1),
    "EXIF after the pixels": (png_with(chunk(b"eXIf", TURNED), before=b"IEND"), 6),
    "a damaged count of frames": (png_with(chunk(b"acTL", b"\0")), 1),
    "EXIF as text": (
        png_with(
            chunk(b"zTXt", b"Raw profile type exif\0\0"
                + zlib.compress(b"\nexif\n  50\n" + (EXIF + TURNED).hex().encode())),
        ),
        6,
    ),
    "EXIF as text that is none": (
        png_with(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nxyz")),
        1,
    ),
    "the orientation in XMP": (
        png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + b'tiff:Orientation="3"')),
        3,
    ),
}  # fmt: skip
TIFFS = {
    "an odd type of a tag": (tiff(PICTURE, 8, (305, 5, 1, 8), (274, 3, 1, 6)), 6),
    "a tag that leads out of the file": (tiff(PICTURE, 8, (270, 2, 999, 2**31), (274, 3, 1, 3)), 3),
    "EXIF that leads out of the file": (tiff(PICTURE, 8, (34665, 4, 1, 2**31)), 1),
    "EXIF that is the image": (tiff(PICTURE, 8, (34665, 4, 1, 8), (34853, 4, 1, 9)), 1),
    "a profile that leads out of the file": (tiff(PICTURE, 8, (34675, 7, 2**20, 2**31)), 1),
    "a resolution by zero": (tiff(PICTURE, 8, (282, 5, 1, 0), (283, 5, 1, 2**31)), 1),
    "an unknown type": (tiff(PICTURE, 8, (37000, 99, 1, 0)), 1),
    "an unknown orientation": (tiff(PICTURE, 8, (274, 3, 1, 77)), 1),
}
FILES = {
    f"{form}: {name}": (content, number)
    for form, files in (("JPEG", JPEGS), ("PNG", PNGS), ("TIFF", TIFFS))
    for name, (content, number) in files.items()
}


@pytest.mark.parametrize("name", FILES)
def test_metadata_that_do_not_change_pixels_never_decide(name):
    content, number = FILES[name]
    stored = PICTURE
    if name.startswith("JPEG"):
        stored = np.asarray(read_image(saved("JPEG", quality=95)))
    assert np.array_equal(read_image(content), UPRIGHT[number](stored))


@pytest.mark.parametrize("form", ["WEBP", "AVIF"])
def test_damaged_exif_of_other_formats_does_not_decide_either(form):
    picture = np.asarray(read_image(saved(form, lossless=True)))
    damaged = exif(orientation(1), RATIONAL_SOFTWARE)
    content = saved(form, lossless=True, exif=damaged)
    assert np.array_equal(read_image(content), picture)
    content = content.replace(damaged, b"\0" * len(damaged))
    assert np.array_equal(read_image(content), picture)


def test_a_damaged_resolution_of_a_jpeg_2000_does_not_decide():
    content = saved("JPEG2000")
    start = content.index(b"jp2h") - 4
    length = int.from_bytes(content[start : start + 4], "big")
    box = struct.pack(">I4s", 12, b"res ") + b"resc"
    head = struct.pack(">I", length + len(box)) + content[start + 4 : start + length]
    damaged = content[:start] + head + box + content[start + length :]
    assert np.array_equal(read_image(damaged), read_image(content))


@pytest.mark.parametrize("number", UPRIGHT)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_the_orientation_is_applied_once_in_every_format_that_has_it(form, number):
    options = {"lossless": True} if form == "WEBP" else {"quality": 95} if form == "JPEG" else {}
    tags = Image.Exif()
    tags[274] = number
    stored = np.asarray(read_image(saved(form, **options)))
    upright = np.asarray(read_image(saved(form, exif=tags, **options)))
    assert np.array_equal(upright, UPRIGHT[number](stored))


def test_a_wrong_checksum_of_pixels_is_refused():
    content = bytearray(saved("PNG"))
    content[content.index(b"IEND") - 5] ^= 1
    with pytest.raises(ValueError, match="its chunk IDAT does not match its checksum"):
        read_image(bytes(content))


def test_pixels_that_are_cut_short_are_refused():
    for content in (saved("PNG"), saved("JPEG"), tiff(PICTURE, 8)):
        with pytest.raises((OSError, ValueError)):
            read_image(content[: len(content) // 2])


@pytest.mark.parametrize("default_image", [False, True])
def test_an_animated_png_is_refused(default_image):
    turned = Image.fromarray(PICTURE[::-1])
    content = saved("PNG", save_all=True, append_images=[turned], default_image=default_image)
    with pytest.raises(ValueError, match="it is animated"):
        read_image(content)


# Metadata that change pixels.


GREY = np.array([[0, 1, 100, 255], [7, 30, 200, 254]])


@pytest.mark.parametrize(
    ("bits", "order"), [(8, 0), (8, 1), (12, 0), (16, 0), (16, 1)]
)  # Pillow reads no big-endian 12 bits
def test_a_tiff_whose_white_is_zero_is_inverted(bits, order):
    values = np.rint(GREY * ((2**bits - 1) / 255))
    kept = read_image(tiff(values, bits, order=order, photometric=1))
    inverted = read_image(tiff(values, bits, order=order, photometric=0))
    assert np.array_equal(kept, GREY)
    assert np.array_equal(inverted, 255 - GREY)


def test_the_bits_that_a_file_declares_are_its_scale():
    image = read_image(tiff(np.array([[0, 4095], [2048, 257]]), 12))
    assert np.asarray(image).tolist() == [[0, 255], [128, 16]]
    assert LARGEST not in image.info


@pytest.mark.parametrize(
    "content",
    [
        deep_png(GREY[..., None] * 16, 0),
        tiff(GREY * 16, 16),
        tiff(GREY * 16, 16, order=1),
        tiff(GREY * 16, 32, sample_format=2),
        tiff(GREY * 16, 16, sample_format=2),
    ],
    ids=["PNG", "TIFF", "big-endian TIFF", "32 bits", "signed"],
)
def test_deep_grey_images_are_scaled_by_the_bit_depth(content):
    assert np.asarray(read_image(content)).max() == 16  # white is 65,535
    image = read_image(content, 12)
    assert np.array_equal(image, np.rint(GREY * 16 / 4095 * 255))
    assert image.info[LARGEST] == 4080
    with pytest.raises(BitDepthError, match="it has the value 4,080; `dataset.bit_depth: 11`"):
        read_image(content, 11)


DEEP = np.random.default_rng(1).integers(0, 4096, (6, 5, 4))


@pytest.mark.parametrize(
    ("content", "channels"),
    [
        (deep_png(DEEP[..., :3], 2), 3),
        (tiff(DEEP[..., :3], 16), 3),
        (tiff(DEEP[..., :3], 16, order=1), 3),
        (deep_png(np.dstack([DEEP[..., :3], np.full((6, 5), 65_535)]), 6), 3),
        (deep_png(np.dstack([DEEP[..., 0], np.full((6, 5), 65_535)]), 4), 1),
    ],
    ids=["PNG", "TIFF", "big-endian TIFF", "with alpha", "grey with alpha"],
)
def test_deep_colours_are_scaled_by_the_bit_depth(content, channels):
    image = read_image(content, 12)
    expected = np.rint(DEEP[..., :channels] / 4095 * 255)
    assert np.array_equal(np.asarray(image.convert("RGB")), expected.repeat(3 // channels, 2))
    assert image.info[LARGEST] == DEEP[..., :channels].max()
    assert read_image(content).info[LARGEST] == DEEP[..., :channels].max()


def test_colours_of_sixteen_bits_keep_their_brightness():
    values = np.arange(6 * 5 * 3).reshape(6, 5, 3) * 700
    image = read_image(deep_png(values, 2))
    assert np.array_equal(image, values >> 8)
    assert image.info[LARGEST] >> 8 == values.max() >> 8


def deflated_planes(values: np.ndarray) -> bytes:
    """A TIFF of 16 bits whose channels are compressed apart."""
    planes = [zlib.compress(plane.astype("<u2").tobytes()) for plane in values.transpose(2, 0, 1)]
    height, width = values.shape[:2]
    extra = 8 + sum(map(len, planes))
    starts = np.cumsum([8, *map(len, planes)])[:3]
    arrays = struct.pack("<3H", 16, 16, 16) + struct.pack("<6I", *starts, *map(len, planes))
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, extra), (259, 3, 1, 8)]
    entries += [(262, 3, 1, 2), (273, 4, 3, extra + 6), (277, 3, 1, 3), (278, 3, 1, height)]
    entries += [(279, 4, 3, extra + 18), (284, 3, 1, 2)]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    head = b"II*\0" + struct.pack("<I", extra + len(arrays))
    return head + b"".join(planes) + arrays + directory


def test_the_transparent_value_of_a_deep_image_becomes_white():
    values = np.array([[[300], [301], [65_535], [0]]])
    image = read_image(deep_png(values, 0, chunk(b"tRNS", struct.pack(">H", 300))))
    assert np.asarray(image.convert("L"))[0].tolist() == [255, 1, 255, 0]
    colours = np.array([[[300, 0, 0], [301, 0, 0]]])
    image = read_image(deep_png(colours, 2, chunk(b"tRNS", struct.pack(">HHH", 300, 0, 0))))
    assert np.asarray(image.convert("RGB"))[0].tolist() == [[255, 255, 255], [1, 0, 0]]


def test_a_grey_png_of_few_bits_is_white_where_it_is_transparent():
    for bits, step in ((2, 85), (4, 17)):
        values = range(2**bits)
        header = struct.pack(">IIBBBBB", len(values), 1, bits, 0, 0, 0, 0)
        row = int("".join(f"{value:0{bits}b}" for value in values), 2)
        pixels = zlib.compress(b"\0" + row.to_bytes(len(values) * bits // 8, "big"))
        parts = [(b"IHDR", header), (b"tRNS", b"\0\1"), (b"IDAT", pixels), (b"IEND", b"")]
        image = read_image(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
        expected = [255 if value == 1 else step * value for value in values]
        assert np.asarray(image.convert("L"))[0].tolist() == expected


def test_a_ppm_of_sixteen_bits_is_read_as_a_png_of_them():
    for values in (PICTURE.astype(int) << 4, PICTURE.astype(int) << 8):
        height, width = values.shape[:2]
        ppm = f"P6 {width} {height} 65535\n".encode() + values.astype(">u2").tobytes()
        for bit_depth in (None, 12, 16):
            if bit_depth == 12 and values.max() > 4095:
                continue
            found, png = (read_image(c, bit_depth) for c in (ppm, deep_png(values, 2)))
            assert np.array_equal(found, png)
            assert found.info[LARGEST] == png.info[LARGEST]
    scaled = (
        b"P6 2 1 1023\n" + np.array([0, 512, 1023] * 2, ">u2").tobytes()
    )  # it says what is white
    assert np.asarray(read_image(scaled))[0, 0].tolist() == [0, 128, 255]
    with pytest.raises(ValueError, match="a PPM of 16 bits as text"):
        read_image(b"P3 1 1 65535 9 9 9 ")


@pytest.mark.parametrize("bit_depth", [None, 10, 12])
def test_a_grey_ppm_that_says_what_is_white_needs_no_bit_depth(bit_depth):
    values = np.array([0, 512, 1023])
    for ppm in (b"P5 3 1 1023\n" + values.astype(">u2").tobytes(), b"P2 3 1 1023\n0 512 1023 "):
        image = read_image(ppm, bit_depth)
        assert np.abs(np.asarray(image)[0].astype(int) - [0, 128, 255]).max() <= 1
        assert LARGEST not in image.info


def test_pixels_of_unknown_range_are_refused_in_words():
    for content, words in (
        (tiff(GREY / 255, 32, sample_format=3), "floating-point pixels"),
        (tiff(GREY - 100, 16, sample_format=2), "negative pixels"),
        (tiff(GREY - 128, 8, sample_format=2), "negative pixels"),
        (tiff(PICTURE, 16, planar=2), "16-bit channels one after another"),
        (deflated_planes(PICTURE), "16-bit channels one after another"),
        (tiff(GREY * 9999, 32, sample_format=2), "more than 16 bits a channel"),
    ):
        with pytest.raises(ValueError, match=words):
            read_image(content)


def test_a_cmyk_jpeg_of_adobe_has_its_colours():
    """Adobe stores the inverse: 255 is no ink."""
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:, 8:, 1:3] = 255  # magenta and yellow make red
    content = saved("JPEG", Image.frombytes("CMYK", (16, 16), ink.tobytes()), quality=100)
    pixels = np.asarray(read_image(content).convert("RGB")).astype(int)
    assert np.abs(pixels[:, :6] - 255).max() <= 2
    assert np.abs(pixels[:, 10:] - [255, 0, 0]).max() <= 2


def test_pillow_opens_no_other_format_once_it_was_told(monkeypatch):
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    read_nothing_else()
    for form in ("EPS", "ICO", "TGA"):
        with pytest.raises(UnidentifiedImageError):
            Image.open(io.BytesIO(saved(form)))
    assert Image.open(io.BytesIO(saved("PNG"))).format == "PNG"


def test_images_of_other_code_are_turned_by_the_exif_that_they_have():
    image = Image.fromarray(PICTURE)
    image.info["exif"] = EXIF + TURNED
    assert np.array_equal(eight_bits(image), UPRIGHT[6](PICTURE))
