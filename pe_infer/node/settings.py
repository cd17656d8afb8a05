"""What a node is told; every option in one place. `configuration` reads them.

What has no default has an example, for ``pe-infer serve --print-config``.
"""

import os
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

ENVIRONMENT: Final = "PE_INFER_NODE__"


def _web_address(url: str) -> str:
    """Refuse what no request can be made of."""
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError("a URL is printable ASCII without spaces: percent-encode the rest")
    try:
        parts = urlsplit(url)
        told = (parts.hostname, parts.port)
    except ValueError as exc:
        raise ValueError(f"{exc}: give a URL such as https://console.example/pe-infer") from exc
    if not told[0]:
        raise ValueError("no host: give a URL such as https://console.example/pe-infer")
    if parts.username is not None:
        raise ValueError("a user or password does not belong in a URL: use secret")
    return url


# Spaces around an AE title do not count (PS3.5 section 6.2).
AeTitle = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True, min_length=1, max_length=16, pattern=r"^[\x20-\x5b\x5d-\x7e]+$"
    ),
]
Host = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, pattern=r"^\S+$")]
WebAddress = Annotated[str, Field(pattern=r"^https?://"), AfterValidator(_web_address)]
Port = Annotated[int, Field(ge=1, le=65535)]
_SECRETS: Final = ("secret", "secret_file", "secret_variable")

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,32}$")]
Seconds = Annotated[float, Field(ge=0.001, le=7 * 86400)]  # a week
Network = IPv4Network | IPv6Network


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Tls(_Section):
    """Mutual TLS: both sides show a certificate of this authority."""

    certificate: Annotated[Path, Field(examples=["/etc/pe-infer/node.pem"])]
    """This node's certificate, PEM, with the chain."""
    key: Annotated[Path, Field(examples=["/etc/pe-infer/node.key"])]
    """Its private key, PEM."""
    authority: Annotated[Path, Field(examples=["/etc/pe-infer/authority.pem"])]
    """Certificates that vouch for the other side, PEM."""


class Listen(_Section):
    """Who may connect, and where."""

    ae_title: AeTitle = "PE_INFER"
    """This node's AE title; associations that call another one are rejected."""
    host: Host = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every interface."""
    port: Port = 11112
    """Port to listen on."""
    allowed_ae_titles: tuple[AeTitle, ...] = ()
    """Calling AE titles that are let in; empty: any."""
    allowed_addresses: tuple[Network, ...] = ()
    """Networks that are let in, such as 10.1.0.0/16; empty: any."""
    associations: Annotated[int, Field(ge=1, le=256)] = 16
    """At once; more are rejected."""
    connections_per_address: Annotated[int, Field(ge=1, le=256)] = 8
    """At once, from one address; more are hung up on. Fewer than associations, so that no address
    takes every place. Where a router or gateway sends for several, raise it up to associations."""
    max_pdu_bytes: Annotated[int, Field(ge=4096, le=1 << 20)] = 131072
    """Largest PDU that is received."""
    idle_s: Seconds = 60.0
    """A peer that says nothing for so long is cut off."""
    tls: Tls | None = None
    """Without it, connections are not encrypted."""


class Limits(_Section):
    """What is not taken: a sender is told 0xA700 (no resources) or 0xA900 (cannot take this)."""

    object_bytes: Annotated[int, Field(ge=1 << 20)] = 1 << 30
    """Largest object."""
    rows: Annotated[int, Field(ge=1, le=65535)] = 2048
    """Most rows of an image."""
    columns: Annotated[int, Field(ge=1, le=65535)] = 2048
    """Most columns of an image."""
    frames: Annotated[int, Field(ge=1)] = 4096
    """Most frames of an image."""
    decoded_bytes: Annotated[int, Field(ge=1 << 20)] = 2 << 30
    """Most bytes of an image's pixels once they are decoded."""
    slices_per_series: Annotated[int, Field(ge=1)] = 10000
    """Most instances of a series."""
    waiting_slices: Annotated[int, Field(ge=1)] = 20000
    """Most instances that are taken and not judged yet, of all series."""
    open_studies: Annotated[int, Field(ge=1, le=256)] = 8
    """Series in memory at once; others wait on disk."""
    free_disk_bytes: Annotated[int, Field(ge=0)] = 2 << 30
    """What slices leave free on the disk for results, ledger and logs, beside 8 MiB for every
    series whose result is still to come. Results leave an eighth of it."""


class Studies(_Section):
    """When a series has ended, and how fast it is judged."""

    quiet_s: Seconds = 10.0
    """A series has ended when nothing came for so long, unless its slices say and agree how many
    they are, and are all there."""
    threads: Annotated[int, Field(ge=1, le=32)] = 2
    """Threads that decode and resample slices; a series is one thread's at a time."""
    stuck_s: Seconds = 120.0
    """The node is not healthy while one step of a series, a slice or its end, takes longer."""


class Engine(_Section):
    """How bundles are run; see ``pe_infer.Detector``."""

    name: str = "auto"
    """auto, openvino, onnxruntime, tensorrt or tensorrt-rtx."""
    precision: Literal["default", "float32"] = "default"
    """float32: nothing is computed in less."""
    threads: Annotated[int | None, Field(ge=1, examples=[4])] = None
    """Of one inference; unset: one per core."""
    operating_point: Annotated[str | None, Field(examples=["screening"])] = None
    """One that every bundle has; unset: each bundle's default."""


class Route(_Section):
    """A rule: all that it names has to hold. Patterns are shell patterns, in any case."""

    bundle: Annotated[str, Field(examples=["pe"])]
    """Name or folder of the bundle; "ignore": keep the slices, judge nothing."""
    modality: Annotated[str | None, Field(examples=["CT"])] = None
    """Pattern for Modality."""
    body_part: Annotated[str | None, Field(examples=["CHEST*"])] = None
    """Pattern for BodyPartExamined."""
    protocol: Annotated[str | None, Field(examples=["*angio*"])] = None
    """Pattern for ProtocolName."""
    description: Annotated[str | None, Field(examples=["*1.0 mm*"])] = None
    """Pattern for SeriesDescription or StudyDescription."""
    calling_ae_title: Annotated[str | None, Field(examples=["CT_*"])] = None
    """Pattern for the sender's AE title."""
    max_thickness_mm: Annotated[float | None, Field(gt=0, allow_inf_nan=False, examples=[2.0])] = (
        None
    )
    """Largest SliceThickness."""


class Routing(_Section):
    """Which bundle judges a series. The first rule that holds decides."""

    bundles: tuple[str, ...] = ()
    """Bundles to choose from by what the headers say; empty: all that are shipped."""
    otherwise: Literal["choose", "ignore"] = "choose"
    """Where no rule holds: choose as ``pe-infer detect`` does (a series that asks for none, or does
    not say, is ignored), or ignore."""
    rules: tuple[Route, ...] = ()
    """[[routing.rules]], first to last."""


class Retry(_Section):
    """How deliveries that fail are tried again; they are never dropped."""

    first_s: Seconds = 5.0
    """Wait after the first failure; twice as long after each further one."""
    most_s: Seconds = 900.0
    """Longest wait."""
    timeout_s: Seconds = 30.0
    """How long a destination may take to answer."""

    @model_validator(mode="after")
    def _waits_grow(self) -> Self:
        if self.most_s < self.first_s:
            raise ValueError(
                f"most_s={self.most_s:g} is shorter than first_s={self.first_s:g}: the longest "
                "wait is at least the first one"
            )
        return self


class DicomDestination(_Section):
    """A C-STORE SCP, such as a PACS."""

    kind: Annotated[Literal["dicom"], Field(examples=["dicom"])]
    """A C-STORE SCP."""
    name: Annotated[Name, Field(examples=["pacs"])]
    """For logs, metrics and ``node status``; unique."""
    host: Annotated[Host, Field(examples=["pacs.example"])]
    """Its address."""
    port: Annotated[Port, Field(examples=[104])]
    """Its port."""
    ae_title: Annotated[AeTitle, Field(examples=["PACS"])]
    """Its AE title."""
    tls: Tls | None = None
    """Without it, the connection is not encrypted."""
    alerts: bool = True
    """Whether provisional alerts go there too, as preliminary reports."""
    commitment: bool = False
    """Ask for storage commitment; a delivery is done when the destination has committed itself."""
    commitment_s: Seconds = 300.0
    """Ask again when no answer came for so long: longer than the destination ever takes."""


class FolderDestination(_Section):
    """A folder that gets a folder for every alert and result."""

    kind: Annotated[Literal["folder"], Field(examples=["folder"])]
    """A folder."""
    name: Annotated[Name, Field(examples=["results"])]
    """For logs, metrics and ``node status``; unique."""
    path: Annotated[Path, Field(examples=["/srv/pe-infer/results"])]
    """Where it is."""


class WebhookDestination(_Section):
    """An URL that gets a POST of JSON for every alert, withdrawal and result."""

    kind: Annotated[Literal["webhook"], Field(examples=["webhook"])]
    """A webhook."""
    name: Annotated[Name, Field(examples=["console"])]
    """For logs, metrics and ``node status``; unique."""
    url: Annotated[WebAddress, Field(examples=["https://console.example/pe-infer"])]
    """Where to POST."""
    secret: Annotated[SecretStr | None, Field(min_length=1, examples=["a long random text"])] = None
    """Key of the HMAC-SHA256 of the body in X-PE-Infer-Signature. Better kept elsewhere:"""
    secret_file: Annotated[Path | None, Field(examples=["/etc/pe-infer/console.secret"])] = None
    """File that holds it, instead of ``secret``."""
    secret_variable: Annotated[str | None, Field(examples=["CONSOLE_SECRET"])] = None
    """Environment variable that holds it, instead of ``secret``."""
    attention_maps: bool = False
    """Whether the JSON holds the attention maps, some 5 kB per slab."""

    @model_validator(mode="before")
    @classmethod
    def _read_the_secret(cls, told: Any) -> Any:
        if not isinstance(told, dict):
            return told
        places = [name for name in _SECRETS if told.get(name) is not None]
        if len(places) > 1:
            raise ValueError(f"{places} are all given: keep one")
        if places == ["secret_file"]:
            try:
                return {**told, "secret": Path(told["secret_file"]).read_text().strip()}
            except (OSError, TypeError, UnicodeError) as exc:
                raise ValueError(f"secret_file={told['secret_file']!r}: {exc}") from exc
        if places == ["secret_variable"]:
            name = str(told["secret_variable"])
            if not os.environ.get(name):
                raise ValueError(f"secret_variable={name!r}: the environment does not have it")
            return {**told, "secret": os.environ[name]}
        return told


Destination = Annotated[
    DicomDestination | FolderDestination | WebhookDestination, Field(discriminator="kind")
]


class Operations(_Section):
    """Logs, metrics, health."""

    host: Host = "127.0.0.1"
    """Address of /metrics, /healthz and /readyz."""
    port: Annotated[int, Field(ge=0, le=65535)] = 11180
    """Its port; 0: none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe lines that are written: debug, info, warning or error."""
    log_format: Literal["json", "text"] = "json"
    """json: a line of JSON per event, on standard error; text: for people."""


class Retention(_Section):
    """When slices and results go: of series that are concluded or ignored, and delivered."""

    hours: Annotated[float, Field(ge=0, allow_inf_nan=False)] | Literal["never"] = 72.0
    """After the last slice; or "never"."""


class NodeSettings(BaseSettings):
    """Everything a node is told."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        cli_avoid_json=False,
    )

    state_dir: Annotated[Path, Field(examples=["/var/lib/pe-infer"])]
    """Folder for slices, results and the ledger; private to the user that runs the node."""
    listen: Listen = Listen()
    limits: Limits = Limits()
    studies: Studies = Studies()
    engine: Engine = Engine()
    routing: Routing = Routing()
    retry: Retry = Retry()
    destinations: tuple[Destination, ...] = ()
    """[[destinations]], each with kind, name and what its kind needs."""
    operations: Operations = Operations()
    retention: Retention = Retention()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what is given and nothing else: `configuration` looks at the environment."""
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [destination.name for destination in self.destinations]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"destinations of one name: {twice}; give each a name of its own")
        return self
