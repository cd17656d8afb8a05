"""What each option of a node takes and refuses."""

import json
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pe_infer.node import settings
from pe_infer.node.settings import NodeSettings

PACS = {"kind": "dicom", "name": "pacs", "host": "pacs", "port": 104, "ae_title": "PACS"}
FOLDER = {"kind": "folder", "name": "results", "path": "/results"}
WEBHOOK = {"kind": "webhook", "name": "console", "url": "https://console.example:8443/a?b=c"}
SECTIONS = [
    section
    for section in vars(settings).values()
    if isinstance(section, type)
    and issubclass(section, BaseModel)
    and section.__module__ == settings.__name__
    and not section.__name__.startswith("_")
]


def told(**sections: Any) -> NodeSettings:
    return NodeSettings.model_validate({"state_dir": "/state", **sections})


def refusal(**sections: Any) -> tuple[tuple[Any, ...], str]:
    """Place and text of the only thing that is wrong."""
    with pytest.raises(ValidationError) as caught:
        told(**sections)
    (problem,) = caught.value.errors()
    return problem["loc"], problem["msg"]


def webhook(**changes: Any) -> dict[str, Any]:
    return {"destinations": [{**WEBHOOK, **changes}]}


def test_only_a_folder_for_its_state_has_to_be_told() -> None:
    assert told().state_dir == Path("/state")
    with pytest.raises(ValidationError, match="state_dir"):
        NodeSettings.model_validate({})


def test_by_default_only_this_machine_can_connect() -> None:
    assert told().listen.host == "127.0.0.1"
    assert told().operations.host == "127.0.0.1"


def fields() -> list[tuple[str, FieldInfo]]:
    return [
        (f"{section.__name__}.{name}", field)
        for section in SECTIONS
        for name, field in section.model_fields.items()
    ]


@pytest.mark.parametrize(("name", "field"), fields())
def test_every_option_says_what_it_is_for(name: str, field: FieldInfo) -> None:
    is_section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    assert is_section or field.description, name


@pytest.mark.parametrize("section", SECTIONS)
def test_no_section_takes_an_option_that_does_not_exist(section: type[BaseModel]) -> None:
    assert section.model_config["extra"] == "forbid"
    assert section.model_config["frozen"] is True


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("listen", "port", 0),
        ("listen", "port", 65536),
        ("listen", "host", ""),
        ("listen", "host", "a b"),
        ("listen", "ae_title", ""),
        ("listen", "ae_title", "  "),
        ("listen", "ae_title", "SEVENTEEN_LETTERS"),
        ("listen", "ae_title", "BACK\\SLASH"),
        ("listen", "ae_title", "TAB\tTAB"),
        ("listen", "ae_title", "ÄÖÜ"),
        ("listen", "associations", 0),
        ("listen", "associations", 257),
        ("listen", "connections_per_address", 0),
        ("listen", "connections_per_address", 257),
        ("listen", "max_pdu_bytes", 4095),
        ("listen", "idle_s", 0.0),
        ("listen", "idle_s", float("inf")),
        ("listen", "idle_s", float("nan")),
        ("limits", "rows", 65536),
        ("limits", "frames", 0),
        ("limits", "open_studies", 0),
        ("limits", "free_disk_bytes", -1),
        ("studies", "quiet_s", -1.0),
        ("studies", "threads", 0),
        ("engine", "precision", "half"),
        ("engine", "threads", 0),
        ("routing", "otherwise", "guess"),
        ("retry", "first_s", 0.0),
        ("retry", "timeout_s", float("inf")),
        ("retry", "timeout_s", 1e9),
        ("operations", "port", -1),
        ("operations", "log_level", "verbose"),
        ("operations", "log_format", "xml"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_where_it_stands(
    section: str, option: str, value: object
) -> None:
    place, _ = refusal(**{section: {option: value}})
    assert place == (section, option)


@pytest.mark.parametrize("hours", [-1.0, float("inf"), float("nan"), "always"])
def test_results_are_kept_for_a_time_that_makes_sense(hours: object) -> None:
    with pytest.raises(ValidationError, match=r"retention\.hours"):
        told(retention={"hours": hours})


def test_an_option_that_does_not_exist_is_refused() -> None:
    assert refusal(listen={"prot": 104})[0] == ("listen", "prot")


def test_spaces_around_an_ae_title_do_not_count() -> None:
    listen = told(listen={"ae_title": " NODE 1 ", "allowed_ae_titles": ["CT  "]}).listen
    assert (listen.ae_title, listen.allowed_ae_titles) == ("NODE 1", ("CT",))


def test_networks_and_single_addresses_are_let_in() -> None:
    addresses = ["10.1.0.0/16", "192.168.0.7", "fd00::/8"]
    listen = told(listen={"allowed_addresses": addresses}).listen
    assert listen.allowed_addresses == tuple(map(ip_network, addresses))


def test_an_address_with_bits_beyond_its_mask_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"listen\.allowed_addresses"):
        told(listen={"allowed_addresses": ["10.1.2.3/16"]})


def test_the_longest_wait_is_not_shorter_than_the_first() -> None:
    place, text = refusal(retry={"first_s": 60.0, "most_s": 30.0})
    assert place == ("retry",)
    assert text.endswith(
        "most_s=30 is shorter than first_s=60: the longest wait is at least the first one"
    )


def test_destinations_have_names_of_their_own() -> None:
    place, text = refusal(destinations=[PACS, {**FOLDER, "name": "pacs"}])
    assert place == ()
    assert "['pacs']; give each a name of its own" in text


@pytest.mark.parametrize("name", ["", "a b", "../x", "a" * 33, "Ä"])
def test_a_name_can_be_part_of_a_file_name_and_of_a_metric(name: str) -> None:
    assert refusal(destinations=[{**FOLDER, "name": name}])[0][-1] == "name"


def test_a_kind_of_destination_that_does_not_exist_is_refused() -> None:
    place, text = refusal(destinations=[{**FOLDER, "kind": "ftp"}])
    assert place == ("destinations", 0)
    assert all(kind in text for kind in ("'dicom'", "'folder'", "'webhook'"))


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("ftp://console.example/", "pattern"),
        ("console.example/hooks", "pattern"),
        ("https:///hooks", "no host"),
        ("https://:8443/hooks", "no host"),
        ("https://console.example:port/", "give a URL such as"),
        ("https://console.example:70000/", "give a URL such as"),
        ("https://[::1/", "give a URL such as"),
        ("https://console.example/a b", "percent-encode"),
        ("https://console.example/a\r\nX: y", "percent-encode"),
        ("https://console.example/ä", "percent-encode"),
    ],
)
def test_a_url_that_no_request_can_be_made_of_is_refused(url: str, text: str) -> None:
    place, said = refusal(**webhook(url=url))
    assert place[-1] == "url"
    assert text in said


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    place, said = refusal(**webhook(url="https://user:hidden@console.example/"))
    assert place[-1] == "url"
    assert "use secret" in said
    assert "hidden" not in said


def test_an_empty_secret_is_refused() -> None:
    assert refusal(**webhook(secret=""))[0][-1] == "secret"


def test_a_secret_is_not_shown() -> None:
    made = told(**webhook(secret="hidden"))  # noqa: S106
    assert "hidden" not in repr(made)
    assert "hidden" not in json.dumps(made.model_dump(mode="json"))


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        told().listen.port = 1
