"""Checks the versions of Python and of all packages that hpc-rlhf requires, directly or indirectly."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

from hpc_rlhf.launch.doctor.finding import Finding, error, ok

_NAME = "hpc-rlhf"


def check() -> list[Finding]:
    """Check Python's version, and those of all direct and indirect requirements."""
    from packaging.specifiers import SpecifierSet

    try:
        required = metadata.metadata(_NAME)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return [error("packages", f"{_NAME} is not installed in this Python", "install it here: pip install hpc-rlhf")]
    version = platform.python_version()
    if SpecifierSet(required).contains(version, prereleases=True):
        python = ok("python", f"{version} ({required} is required)")
    else:
        python = error(
            "python", f"{version}, but {required} is required", f"create an environment with Python {required}"
        )
    names: set[str] = set()
    clashes = list(dict.fromkeys(_clashes(names)))
    if clashes:
        return [python, *clashes]
    return [python, ok("packages", f"{len(names)} packages, in versions that satisfy each other")]


def _clashes(names: set[str]) -> Iterator[Finding]:
    """Packages that are missing or of a wrong version.

    Adds the names of all that were checked to ``names``.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    todo = [(_NAME, "")]
    known = set(todo)
    while todo:
        package, extra = todo.pop()
        for line in metadata.requires(package) or ():
            need = Requirement(line)
            if need.marker is not None and not need.marker.evaluate({"extra": extra}):
                continue
            try:
                version = metadata.version(need.name)
            except metadata.PackageNotFoundError:
                yield error("packages", f"{need.name} is missing; {package} needs it", _install(need))
                continue
            names.add(canonicalize_name(need.name))
            if not need.specifier.contains(version, prereleases=True):
                yield error(
                    "packages", f"{need.name} is {version}, but {package} requires {need.specifier}", _install(need)
                )
            new = {(canonicalize_name(need.name), each) for each in ("", *need.extras)} - known
            known |= new
            todo.extend(sorted(new))


def _install(need: object) -> str:
    text = str(need).partition(";")[0].strip()
    return f'pip install "{text}" (add -c constraints.txt for the tested versions)'
