"""Results as figures and as a page. Reads results files only: nothing is measured here."""

from __future__ import annotations

from lminf_edge.errors import ConfigError


def check_matplotlib() -> None:
    """Figures need matplotlib, which is not installed with the package by default.

    Raises:
        ConfigError: It is not there.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"figures need matplotlib, which cannot be imported ({error}): pip install 'lminf-edge[report]'"
        ) from error
