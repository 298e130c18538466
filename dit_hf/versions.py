"""Whether the installed packages are as new as this one needs; pyproject.toml says how new that is."""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import Requirement


def check_versions(extra: str = "") -> None:
    """Check the installed packages against the requirements of dit_hf; one that is missing is left to its import.

    Args:
        extra: Check those of this optional group too.

    Raises:
        ImportError: naming the packages that do not fit, the versions that do, and the installed ones.
    """
    try:
        requirements = [Requirement(line) for line in metadata.requires("dit_hf") or ()]
    except metadata.PackageNotFoundError:  # it runs from its folder and was never installed
        return
    unfit = {}
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            try:
                installed = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                continue
            if not requirement.specifier.contains(installed, prereleases=True):
                unfit[f"{requirement.name}{requirement.specifier}"] = installed
    if unfit:
        needed = ", ".join(f"{needed} ({installed} is installed)" for needed, installed in unfit.items())
        command = " ".join(f"'{needed}'" for needed in unfit)
        raise ImportError(f"dit_hf needs {needed}; in an environment of its own: pip install {command}")
