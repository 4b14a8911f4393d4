"""Take the README's picture of the report, of this machine's last run.

    python docs/pictures/take.py

Needs Chromium. Shows the decision and the first two charts, in the light theme.
"""

import base64
import io
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from browser import browser  # noqa: E402

WIDTH = 1200  # pixels
#: Hide what is not shown, and return the height of the rest.
SHORTEN = """
for (const element of document.querySelectorAll(
    ".summary, nav, nav ~ p, section:not(.decision):not(#cost), #cost .card:nth-of-type(n + 3)"))
  element.style.display = "none";
Math.ceil([...document.querySelectorAll("#cost .card")].slice(0, 2)
  .reduce((bottom, card) => Math.max(bottom, card.getBoundingClientRect().bottom), 0)) + 24
"""


def main() -> None:
    with browser() as page:
        page.show(ROOT / "reports/index.html", width=WIDTH)
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": page.evaluate(SHORTEN), "scale": 1}
        shot = page.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip
        )
    image = Image.open(io.BytesIO(base64.b64decode(shot["data"])))
    path = ROOT / "docs/pictures/report.png"
    image.convert("RGB").quantize(64).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
