"""The command line. The only user of typer and rich."""

from pe_infer.cli.app import main

__all__ = ["main"]
