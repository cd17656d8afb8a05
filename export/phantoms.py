"""What a bundle is measured on: a phantom, or a real scan with painted findings. No PyTorch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from export.datasets.semisynthetic.backgrounds import open_background
from export.datasets.semisynthetic.painted import RealPairs
from pe_infer.manifest import Manifest
from pe_infer.phantom import Phantom, open_phantom
from pe_infer.scope import check_scope
from pe_infer.synthetic import phantom_for

AnatomyOption = Annotated[
    str | None, typer.Option(help="Phantom, where the bundle accepts more than one.")
]
SemiSyntheticOption = Annotated[
    Path | None, typer.Option(help="Folder of a real series without the finding, to paint into.")
]
VolumeOption = Annotated[
    str | None, typer.Option(help="The scan in that folder, where it is a NIfTI volume.")
]
ArteriesOption = Annotated[
    str | None, typer.Option(help="NIfTI mask of its pulmonary arteries, in the same folder.")
]


@dataclass(frozen=True, kw_only=True)
class RealSource:
    """A real scan that findings are painted into, as it is named on the command line.

    Attributes:
        folder: Of a DICOM series, or of NIfTI volumes.
        volume: The scan, where it is a NIfTI volume.
        arteries: NIfTI mask of its pulmonary arteries.
    """

    folder: Path
    volume: str | None = None
    arteries: str | None = None

    def open(self, anatomy: str) -> RealPairs:
        """Pairs made of it.

        Raises:
            ConfigurationError: Nothing can be painted into that anatomy.
            InputError: The scan cannot be read, or findings have no place in it.
        """
        return open_background(
            anatomy,
            self.folder,
            self.folder.name,
            volume=self.volume,
            arteries=self.arteries,
        )


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
