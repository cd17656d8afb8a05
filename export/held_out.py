"""Which seeds of the phantom a bundle has seen. Needs no PyTorch."""

from collections.abc import Mapping
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
