"""The command lminf-edge: one module for each subcommand."""

from __future__ import annotations

from lminf_edge.cli.app import main

__all__ = ["main"]
