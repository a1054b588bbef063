"""Checks the versions of Python and of all packages that hpc-rlhf requires, directly or indirectly."""

from __future__ import annotations

import platform
from importlib import metadata

from hpc_rlhf.launch.doctor.finding import Finding, error, ok

_NAME = "hpc-rlhf"


def check() -> list[Finding]:
    """Check that all versions satisfy what hpc-rlhf and its packages require."""
    from packaging.specifiers import SpecifierSet

    try:
        required = metadata.metadata(_NAME)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return [error("packages", f"{_NAME} is not installed in this Python", "install it here: pip install hpc-rlhf")]
    version = platform.python_version()
    if SpecifierSet(required).contains(version, prereleases=True):
        python = ok("python", f"{version} ({required} is required)")
    else:
        fix = f"create an environment with Python {required}"
        python = error("python", f"{version}, but {required} is required", fix)
    return [python, *_requirements()]


def _requirements() -> list[Finding]:
    """The packages that are missing or of a wrong version, direct requirements and those of others."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    names: set[str] = set()
    clashes: list[Finding] = []
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
                clashes.append(error("packages", f"{need.name} is missing; {package} needs it", _install(need)))
                continue
            names.add(canonicalize_name(need.name))
            if not need.specifier.contains(version, prereleases=True):
                message = f"{need.name} is {version}, but {package} requires {need.specifier}"
                clashes.append(error("packages", message, _install(need)))
            new = {(canonicalize_name(need.name), each) for each in ("", *need.extras)} - known
            known |= new
            todo.extend(sorted(new))
    if clashes:
        return list(dict.fromkeys(clashes))
    return [ok("packages", f"{len(names)} packages, in versions that satisfy each other")]


def _install(need: object) -> str:
    text = str(need).partition(";")[0].strip()
    return f'pip install "{text}" (add -c constraints.txt for the tested versions)'
