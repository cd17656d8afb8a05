"""What the node needs beyond the package's own dependencies."""

from importlib.util import find_spec
from typing import Final

from pe_infer.errors import ConfigurationError

_LIBRARIES: Final = ("prometheus_client", "pydantic_settings", "pynetdicom", "structlog")


def require_node_extra(command: str) -> None:
    """Refuse where a library of the extra ``node`` is missing.

    Raises:
        ConfigurationError: One is.
    """
    if missing := [name for name in _LIBRARIES if find_spec(name) is None]:
        raise ConfigurationError(
            f"pe-infer {command} needs {', '.join(missing)}: pip install 'pe-infer[node]'"
        )
