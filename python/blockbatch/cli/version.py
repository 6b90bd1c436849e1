"""The version that was installed."""

from __future__ import annotations


def version() -> str:
    """As the package's metadata says; of a source folder as the package itself says."""
    from importlib import metadata

    try:
        return metadata.version("blockbatch")
    except metadata.PackageNotFoundError:
        from blockbatch_kernels import __version__

        return __version__
