"""Why: a link into the UI is right only if its page shows what it promises. How: headless Chromium takes a picture.

    python scripts/screenshot_ui.py URL out.png

The UI has to run (`make ui`). Chromium comes with `apt-get install chromium`; another build is named with --browser.
The page gets `--wait` seconds of the browser's own clock, which runs ahead while nothing loads: 120 take about 10.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    """Take one picture; returns the browser's exit code."""
    parser = argparse.ArgumentParser(description="Picture of a page in headless Chromium.")
    parser.add_argument("url")
    parser.add_argument("picture", type=Path, help="PNG to write")
    parser.add_argument("--size", default="2000,1400", help="width,height in pixels")
    parser.add_argument("--wait", type=float, default=120.0, help="seconds of the browser's clock")
    parser.add_argument("--browser", default="chromium")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as profile:
        command = [
            options.browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--window-size={options.size}",
            f"--virtual-time-budget={options.wait * 1000:.0f}",
            f"--screenshot={options.picture.resolve()}",
            options.url,
        ]
        return subprocess.run(command, check=False, stderr=subprocess.DEVNULL, timeout=300).returncode


if __name__ == "__main__":
    sys.exit(main())
