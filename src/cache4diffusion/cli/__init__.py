"""The command line, ``c4d``: results on stdout, progress and errors on stderr, ``--json`` for machines."""

from __future__ import annotations


def main() -> None:
    """Entry point of ``c4d`` and ``python -m cache4diffusion``."""
    from cache4diffusion.cli.app import app

    app()
