"""Bundles that somebody has altered."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

Edit: TypeAlias = Callable[[dict[str, Any]], object]


def edit_manifest(folder: Path, edit: Edit) -> None:
    path = folder / "bundle.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """A file with its right sha256, as somebody would who wants it to be loaded."""
    (folder / name).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit_manifest(folder, lambda d: d["files"][name].update(sha256=digest))
