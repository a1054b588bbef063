"""Starts Python without the working directory on ``sys.path``: in a shared folder, other users' files would be imported
from there."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

# Options of Python, before the name of a module and its arguments. Python 3.11 has -P for a safe path; a container's
# Python may be older.
_RUN = "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
ANY_PYTHON = ("-u", "-c", f"import sys; sys.path[0] or sys.path.pop(0); import runpy; {_RUN}")
THIS_PYTHON = ("-u", "-P", "-m") if sys.version_info >= (3, 11) else ANY_PYTHON

_CACHES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE")


def module(name: str, *args: str) -> list[str]:
    """The command that runs a module with this Python, as ``python -m`` does, but with a safe path."""
    return [sys.executable, *THIS_PYTHON, name, *args]


def leave_working_directory() -> None:
    """Import nothing more from the working directory, unless PYTHONPATH names it: an empty entry there, and
    ``python -m``, put it before installed packages."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was removed
        return
    named = [os.path.abspath(each) for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    if here in named:
        return
    library = os.path.dirname(os.__file__)
    end = sys.path.index(library) if library in sys.path else 0  # what follows was installed
    sys.path[:end] = [each for each in sys.path[:end] if each not in ("", here)]


def protect(env: MutableMapping[str, str]) -> None:
    """Keep the working directory out of every Python that is started with this environment, also by libraries.

    Relative folders in it become absolute, because ranks work in their run directory. An empty entry in PYTHONPATH,
    which means the working directory, is removed.
    """
    env["PYTHONSAFEPATH"] = "1"
    if folders := env.get("PYTHONPATH"):
        env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(each) for each in folders.split(os.pathsep) if each)
    for name in _CACHES:
        if folder := env.get(name):
            env[name] = os.path.abspath(os.path.expandvars(os.path.expanduser(folder)))
