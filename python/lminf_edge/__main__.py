"""`python -m lminf_edge` is the command lminf-edge."""

from __future__ import annotations

from lminf_edge.cli import main

if __name__ == "__main__":
    main()
