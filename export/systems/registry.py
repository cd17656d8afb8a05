"""Which systems there are, by the ``system`` of their settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from export.systems.base import System
from export.systems.radnet import Radnet
from export.systems.shi import Shi
from export.training.config import Stage1Settings, StudySettings, load_settings, load_toml
from pe_infer.errors import ConfigurationError

SYSTEMS: Final[dict[str, System]] = {system.name: system for system in (Shi(), Radnet())}
BEFORE_NAMES: Final = Shi.name  # settings of before there were two systems do not say which


def system_of(settings: Stage1Settings | StudySettings | Mapping[str, Any]) -> System:
    """The system that settings, or those in a checkpoint, are of.

    Raises:
        ConfigurationError: There is none of that name.
    """
    values = settings if isinstance(settings, Mapping) else settings.model_dump()
    name = values.get("system", BEFORE_NAMES)
    if name not in SYSTEMS:
        raise ConfigurationError(f"system {name!r} is none of {sorted(SYSTEMS)}")
    return SYSTEMS[name]


def refuse_other_system(content: Mapping[str, Any], system: System, path: Path) -> None:
    """Refuse a checkpoint of another system.

    Raises:
        ConfigurationError: Its settings name another one.
    """
    found = system_of(content["settings"]).name
    if found != system.name:
        raise ConfigurationError(
            f"{path} is a checkpoint of system {found!r}, the settings are of {system.name!r}"
        )


def load_study_settings(path: Path) -> StudySettings:
    """Settings of stage 2 of the system that the file names.

    Raises:
        ConfigurationError: See ``export.training.config.load_settings``.
    """
    return load_settings(path, system_of(load_toml(path)).study_settings)
