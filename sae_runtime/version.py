"""Which versions of packages are installed, for manifests and for people who run the service."""

from __future__ import annotations

from importlib import metadata


def installed_version(package: str) -> str | None:
    """A package's version, such as "2.13.0"; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def code_version() -> str:
    """What made a file, for its record: "saeserve 0.1.0"."""
    return f"saeserve {installed_version('saeserve') or '(not installed)'}"
