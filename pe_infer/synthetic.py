"""Which phantom a bundle can be shown."""

from typing import TYPE_CHECKING

from pe_infer.errors import ConfigurationError, ScopeError
from pe_infer.manifest import Manifest
from pe_infer.scope import check_scope

if TYPE_CHECKING:  # phantoms bring SciPy, which commands need not wait for
    from pe_infer.phantom import Phantom


def phantom_for(manifest: Manifest) -> "Phantom":
    """The phantom whose series are what a bundle was made for.

    Args:
        manifest: Of the bundle.

    Raises:
        ConfigurationError: None is, or more than one.
    """
    from pe_infer.phantom import ANATOMIES, open_phantom  # noqa: PLC0415  imports SciPy

    fitting = []
    for anatomy in ANATOMIES:
        phantom = open_phantom(anatomy)
        try:
            check_scope(manifest.scope, phantom.series, bundle=manifest.name)
        except ScopeError:
            continue
        fitting.append(phantom)
    if len(fitting) == 1:
        return fitting[0]
    names = [phantom.anatomy for phantom in fitting]
    said = (
        f"the phantoms {names} all fit"
        if names
        else f"none of the phantoms {sorted(ANATOMIES)} fits"
    )
    raise ConfigurationError(
        f"bundle {manifest.name!r}: {said} its scope (modality, body part, contrast). "
        "Show it studies of your own."
    )
