"""Take the pictures of the documentation: a study's report page, or its main plot alone, through headless Chromium.

    python docs/screenshot.py studies/example docs/images/front.png --theme light
    python docs/screenshot.py studies/example docs/images/page.png --whole --height 2600

Needs chromium on the PATH; nothing is loaded from the network.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=10000",
)  # fmt: skip
ONLY_FRONT = "header.top, footer, main > :not(:has(#pareto)), section > .note { display: none } section { margin-top: 16px }"


def take(page: Path, picture: Path, *, theme: str, width: int, height: int, scale: float, whole: bool) -> None:
    """Write `picture` of the report `page`; its main plot and the chosen network alone unless `whole`."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit("no chromium on the PATH; hint: sudo apt install chromium")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        style = "" if whole else f"<style>{ONLY_FRONT}</style>"
        copy.write_text(page.read_text(encoding="utf-8").replace("</head>", f"{style}</head>", 1), encoding="utf-8")
        picture.parent.mkdir(parents=True, exist_ok=True)
        size = [f"--window-size={width},{height}", f"--force-device-scale-factor={scale:g}", f"--screenshot={picture.resolve()}"]
        command = [browser, *FLAGS, f"--user-data-dir={folder}/profile", *size, f"{copy.as_uri()}#theme={theme}"]
        subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    """Parse the command line and take one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of the study, with its report.html")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    parser.add_argument("--theme", choices=("light", "dark"), default="light")
    parser.add_argument("--whole", action="store_true", help="the page from its top, not the main plot alone")
    parser.add_argument("--width", type=int, default=1360)
    parser.add_argument("--height", type=int, default=780)
    parser.add_argument("--scale", type=float, default=1.5)
    given = parser.parse_args()
    page = given.study / "report.html"
    if not page.exists():
        sys.exit(f"no {page}; hint: lowsearch report {given.study.name}")
    take(
        page, given.picture, theme=given.theme, width=given.width, height=given.height, scale=given.scale, whole=given.whole
    )  # fmt: skip
    print(given.picture)


if __name__ == "__main__":
    main()
