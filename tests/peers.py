"""Programs of others that tests run."""

import os
from pathlib import Path


def dcmtk(name: str) -> str | None:
    """A program of DCMTK, if it is installed; pynetdicom installs scripts of the same names."""
    for folder in os.get_exec_path():
        path = Path(folder, name)
        if os.access(path, os.X_OK) and path.is_file() and path.read_bytes()[:4] == b"\x7fELF":
            return str(path)
    return None
