"""An image with a Python, for the sandbox of the code reward."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[3]
APPTAINER = shutil.which("apptainer", path=f"{os.environ['PATH']}:{CHECKOUT}/.venv/apptainer/usr/bin")
_LEFT_OUT = ("site-packages", "test", "tests", "idlelib", "ensurepip", "tkinter", "__pycache__", "config-*")


def make_image(image: Path) -> Path:
    """A folder with this Python, its standard library, and the C libraries that these need."""
    library = Path(os.__file__).parent
    for folder in ("bin", "etc", "proc", "sys", "dev", "tmp", "usr/lib", "lib64", "opt/bin", "opt/lib"):
        (image / folder).mkdir(parents=True)
    (image / "lib").symlink_to("usr/lib")
    (image / "bin/python3").symlink_to("/opt/bin/python3")
    python = Path(sys.executable).resolve()
    shutil.copy(python, image / "opt/bin/python3")
    shutil.copy("/bin/sh", image / "bin")
    shutil.copytree(library, image / "opt/lib" / library.name, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    for program in (python, Path("/bin/sh"), *library.glob("lib-dynload/_ctypes.*")):
        for line in subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout.splitlines():
            for path in [word for word in line.split() if word.startswith("/")]:
                shutil.copy(path, image / ("lib64" if "/ld-" in path else "usr/lib"))
    return image
