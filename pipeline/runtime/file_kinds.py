"""Name what a file is that a failed download left, or Git LFS."""

import re

START_BYTES = 2048  # of a file, that tell

_AGAIN = (
    "The download failed, or needs a login or a confirmation: open the address in a browser, "
    "or use the client of the site."
)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # characters of no text


def describe_text(start: bytes) -> str | None:
    """Say which text a file is, by its first bytes, and what to do; None for other bytes. Continues
    a sentence: a web page, ..."""
    if start.startswith(_LFS_POINTER):
        return (
            "a pointer of Git LFS, not the file that it stands for. Run `git lfs pull` where it "
            "was cloned, or download the file itself."
        )
    if start.startswith(b"\x80") or _CONTROL.search(start):
        return None
    text = " ".join(start.decode("utf-8-sig", "replace").split())
    if text.startswith("<") and re.search(r"<!doctype html|<(html|head|body)\b", text, re.I):
        title = re.search(r"<title>(.{1,100}?)</title>", text, re.IGNORECASE)
        return f"a web page (HTML{f', `{title[1]}`' if title else ''}). {_AGAIN}"
    if text.startswith("<"):
        return f"an XML page (`{text[:100]}`). {_AGAIN}"
    if text.startswith(("{", "[")):
        return f"a JSON text (`{text[:100]}`). {_AGAIN}"
    return f"a text (`{text[:100]}`). {_AGAIN}"
