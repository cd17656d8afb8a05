"""Which seeds of the phantom, and which painted scans, a bundle has seen. Needs no PyTorch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pe_infer.errors import ConfigurationError


def held_out(training: Mapping[str, Any], seeds: range) -> bool:
    """Whether a bundle says which seeds it was trained on, and they are others.

    Args:
        training: ``training`` of the manifest.
        seeds: To be measured on.

    Raises:
        ConfigurationError: It was trained or validated on some of them.
    """
    known: Mapping[str, Any] | None = training.get("seeds")
    for name, (first, count) in (known or {}).items():
        if max(first, seeds.start) < min(first + count, seeds.stop):
            raise ConfigurationError(
                f"seeds {seeds.start} to {seeds.stop - 1}: the bundle used {first} to "
                f"{first + count - 1} for {name}. Pass another --first-seed."
            )
    return known is not None


def painted_into(training: Mapping[str, Any], folder: Path) -> bool | None:
    """Whether training painted findings into a real scan, as far as a bundle knows.

    A scan is known by the folder that the data settings give it, here the last parts of the path:
    several scans of one collection share a source. A folder that was renamed is taken for another
    scan.

    Args:
        training: ``training`` of the manifest.
        folder: Of the scan.

    Returns:
        ``None`` if it is none of those that are known, and the bundle, or what it started from, was
        trained before backgrounds were kept.
    """
    parts = folder.resolve().parts
    known = (Path(name).parts for name in training.get("backgrounds") or ())
    if any(parts[-len(each) :] == each for each in known):
        return True
    return False if training.get("all_backgrounds") else None


def unseen_background(training: Mapping[str, Any], folder: Path) -> bool:
    """Whether a bundle says that its training did not paint into a real scan: `painted_into`."""
    return painted_into(training, folder) is False
