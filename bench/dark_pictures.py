"""Dark variants of the pictures that README.md and docs/ show, which readers of dark pages get.

    python bench/dark_pictures.py

Beside every NAME.png that a page shows stands NAME_dark.png: the same pixels with their lightness turned
round between the colours of a dark page and of its text, in OKLab (Ottosson, 2020), so that hues stay what
they are. To be run after any script that draws; a test compares the two.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SHOWN = re.compile(r'<img [^>]*?src="([^"]+\.png)"')
# Lightness of the page and of its text.
PAGE, TEXT = 0.18, 0.97

_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def dark(pixels: np.ndarray) -> np.ndarray:
    """[height, width, 3] uint8 of sRGB, as a dark page shows them."""
    colors, places = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    values = colors / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    lab = np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T
    # Below 1 the exponent lifts what is not white from the page: colours more than grey lines and cells.
    exponent = 0.8 - 3 * np.hypot(lab[:, 1], lab[:, 2]).clip(0, 0.1)
    lab[:, 0] = PAGE + (TEXT - PAGE) * (1 - lab[:, 0].clip(0, 1)) ** exponent
    linear = ((lab @ np.linalg.inv(_TO_LAB).T) ** 3) @ np.linalg.inv(_TO_LMS).T
    linear = linear.clip(0, 1)
    values = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(values * 255).astype(np.uint8)[places.reshape(-1)].reshape(pixels.shape)


def read(path: Path) -> np.ndarray:
    from matplotlib import image

    return np.rint(image.imread(path)[:, :, :3] * 255).astype(np.uint8)


def pictures() -> list[Path]:
    """The PNG files that pages show."""
    found = {(page.parent / name).resolve() for page in PAGES for name in SHOWN.findall(page.read_text())}
    return sorted(found)


def dark_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}_dark.png")


def main() -> None:
    from matplotlib import image

    for path in pictures():
        image.imsave(dark_path(path), dark(read(path)), metadata={"Software": None})
        print(dark_path(path).relative_to(ROOT))


if __name__ == "__main__":
    main()
