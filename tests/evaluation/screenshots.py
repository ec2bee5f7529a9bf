"""Takes pictures of pages for the documentation.

Usage: ``python -m tests.evaluation.screenshots REPORT FOLDER``, or with the page of ``emo compare``
``python -m tests.evaluation.screenshots PAGE FOLDER NAME``

Those of a report show the transport view of the first run: light, dark, and on a phone. With a name
they show the beginning of the page, on a desktop and on a phone. The script needs chromium,
Playwright and Pillow.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.evaluation.test_page import NAMES

PICTURES = {  # name: scheme, width, height, device pixels per CSS pixel
    "report-light.png": ("light", 1280, 1240, 1.5),
    "report-dark.png": ("dark", 1280, 1240, 1.5),
    "report-phone.png": ("light", 360, 740, 2),
}


def main(report: Path, folder: Path, prefix: str = "") -> None:
    """Takes the pictures, and makes the folder if it is missing."""
    wanted = (
        {
            f"{prefix}.png": ("light", 1280, 1240, 1.5),
            f"{prefix}-phone.png": ("light", 360, 740, 2),
        }
        if prefix
        else PICTURES
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = next(filter(None, map(shutil.which, NAMES)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for name, (scheme, width, height, scale) in wanted.items():
            page = browser.new_page(
                color_scheme=scheme,
                viewport={"width": width, "height": height},
                device_scale_factor=scale,
                reduced_motion="reduce",
            )
            page.goto(report.resolve().as_uri())
            if not prefix:
                page.locator('input[name="transport-run"]').first.check(force=True)
                start = "#transport-title" if width > 900 else ".record"
                scroll = f"document.querySelector('{start}').scrollIntoView(); scrollBy(0, -30)"
                page.evaluate(scroll)
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            picture.quantize(
                256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE
            ).save(folder / name, optimize=True)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
