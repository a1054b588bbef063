"""Creates the pictures in README and docs from a run of the demo: its terminal and its report.

    scripts/install-chromium.sh; pip install asciinema==2.4.0 termtosvg==1.1.0
    PATH=$PWD/.venv/bin:$PATH python docs/pictures.py FOLDER

The demo runs in FOLDER, which the report names. If FOLDER already contains a finished run, that one is used.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
COMMAND = "hpc-rlhf run jobs/tiny.yaml"

COLUMNS, ROWS = 108, 36
DURATION = 16.0  # seconds of the finished recording
FRAME, LAST_FRAME = 0.2, 5.0  # seconds that a frame and the last frame are shown
WIDTH, GAP = 1200, 16  # pixels: width of the page, gap between its sections


def record(cast: Path) -> None:
    """Record the run in a terminal of fixed size."""
    shutil.copytree(ROOT / "jobs", cast.parent / "jobs", dirs_exist_ok=True)
    command = ["asciinema", "rec", "--quiet", "--overwrite", "--cols", str(COLUMNS), "--rows", str(ROWS),
               "--command", COMMAND, str(cast)]  # fmt: skip
    subprocess.run(command, cwd=cast.parent, env={**os.environ, "TERM": "xterm-256color"}, check=True)


def speed_up(cast: Path, fast: Path) -> None:
    """Compress a recording to DURATION seconds, with one event per frame."""
    header, *lines = cast.read_text().splitlines()
    events = [json.loads(line) for line in lines]
    frames = {0: f"$ {COMMAND}\r\n"}
    for time, kind, text in events:
        if kind == "o":
            at = int(time / events[-1][0] * DURATION / FRAME)
            frames[at] = frames.get(at, "") + text
    sped_up = [json.dumps([at * FRAME, "o", text]) for at, text in frames.items()]
    size = {"width": COLUMNS, "height": ROWS}
    fast.write_text("\n".join([json.dumps({**json.loads(header), **size}), *sped_up]) + "\n")


def render_svg(cast: Path, svg: Path) -> None:
    delay = str(int(LAST_FRAME * 1000))
    subprocess.run(["termtosvg", "render", str(cast), str(svg), "-D", delay, "-t", "window_frame"], check=True)


def take_screenshots(report: Path) -> None:
    """Take screenshots of the top of the report and of PPO's curves, in both themes."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for theme in ("light", "dark"):
            page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme=theme)
            page.goto(report.as_uri())
            page.locator("#time details summary").click()  # the table of attempts
            curves = page.locator("#curves-ppo")
            for plot in curves.locator(".plot").all():
                plot.scroll_into_view_if_needed()
                plot.locator("canvas").wait_for()
            page.evaluate("scrollTo({ top: 0, behavior: 'instant' })")
            page.mouse.move(0, 0)
            end = page.locator("#evaluation").bounding_box()
            assert end is not None
            top = {"x": 0, "y": 0, "width": WIDTH, "height": end["y"] + end["height"] + GAP}
            page.screenshot(path=PICTURES / f"report-{theme}.png", clip=top, full_page=True)
            curves.screenshot(path=PICTURES / f"curves-{theme}.png")
        browser.close()
    for png in PICTURES.glob("*.png"):
        Image.open(png).convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE).save(png, optimize=True)


def main(folder: Path) -> None:
    PICTURES.mkdir(exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    cast, fast, report = folder / "run.cast", folder / "fast.cast", folder / "runs" / "tiny" / "report.html"
    if not report.exists() or not cast.exists():
        record(cast)
    speed_up(cast, fast)
    render_svg(fast, PICTURES / "run.svg")
    subprocess.run(["hpc-rlhf", "report", str(report.parent)], check=True)
    take_screenshots(report)
    print(*(f"{path.name}: {path.stat().st_size:,} bytes" for path in sorted(PICTURES.iterdir())), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
