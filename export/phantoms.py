"""Which phantom a bundle is measured on. Needs no PyTorch."""

from pathlib import Path
from typing import Annotated

import typer

from pe_infer.manifest import Manifest
from pe_infer.phantom import Phantom, open_phantom
from pe_infer.scope import check_scope
from pe_infer.synthetic import phantom_for

AnatomyOption = Annotated[
    str | None, typer.Option(help="Phantom, where the bundle accepts more than one.")
]


def chosen_phantom(
    manifest: Manifest, anatomy: str | None = None, configuration: Path | None = None
) -> Phantom:
    """The phantom that was asked for, or the one that a bundle accepts.

    Args:
        manifest: Of the bundle.
        anatomy: A key of ``pe_infer.phantom.ANATOMIES``; ``None`` leaves it to the bundle's scope.
        configuration: Of that anatomy, TOML or JSON; ``None`` is the frozen default.

    Raises:
        ConfigurationError: The bundle accepts none, or more than one and none is named; there is
            none of that name; the configuration is not valid for it.
        ScopeError: The one that is named is not what the bundle was made for.
    """
    phantom = open_phantom(anatomy or phantom_for(manifest).anatomy, configuration)
    check_scope(manifest.scope, phantom.series, bundle=manifest.name)
    return phantom
