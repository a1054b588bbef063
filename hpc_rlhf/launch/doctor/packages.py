"""Whether Python and the packages here are those that hpc-rlhf, and they among themselves, ask for."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

from hpc_rlhf.launch.doctor.finding import Finding, error, ok

_NAME = "hpc-rlhf"


def check() -> list[Finding]:
    """Python's version, and those of all packages that hpc-rlhf needs, directly or not."""
    from packaging.specifiers import SpecifierSet

    try:
        asked = metadata.metadata(_NAME)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return [
            error(
                "packages",
                f"{_NAME} is not installed in this Python",
                "install it here: pip install hpc-rlhf",
            )
        ]
    version = platform.python_version()
    if SpecifierSet(asked).contains(version, prereleases=True):
        python = ok("python", f"{version}, asked for is {asked}")
    else:
        python = error(
            "python", f"{version}, but {asked} is asked for", f"make an environment with Python {asked}"
        )
    names: set[str] = set()
    clashes = list(dict.fromkeys(_clashes(names)))
    if clashes:
        return [python, *clashes]
    return [python, ok("packages", f"{len(names)} packages, each in the versions that the others ask for")]


def _clashes(names: set[str]) -> Iterator[Finding]:
    """What asks for a package that is missing or of another version. Fills in the names of all that were looked at."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    todo = [(_NAME, "")]
    seen = set(todo)
    while todo:
        asking, extra = todo.pop()
        for line in metadata.requires(asking) or ():
            need = Requirement(line)
            if need.marker is not None and not need.marker.evaluate({"extra": extra}):
                continue
            try:
                version = metadata.version(need.name)
            except metadata.PackageNotFoundError:
                yield error("packages", f"{need.name} is missing; {asking} needs it", _install(need))
                continue
            names.add(canonicalize_name(need.name))
            if not need.specifier.contains(version, prereleases=True):
                yield error(
                    "packages",
                    f"{need.name} is {version}, but {asking} asks for {need.specifier}",
                    _install(need),
                )
            new = {(canonicalize_name(need.name), each) for each in ("", *need.extras)} - seen
            seen |= new
            todo.extend(sorted(new))


def _install(need: object) -> str:
    text = str(need).partition(";")[0].strip()
    return f'pip install "{text}" (with -c constraints.txt, the versions that were tested)'
