"""What a node is told: file, environment, flags; the file that --print-config writes."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pe_infer.errors import ConfigurationError
from pe_infer.node.configuration import default_file, load_settings, options
from pe_infer.node.settings import (
    DicomDestination,
    FolderDestination,
    NodeSettings,
    WebhookDestination,
)

STATE = 'state_dir = "/state"\n'


def told(
    tmp_path: Path, text: str | None = STATE, *arguments: str, **environment: str
) -> NodeSettings:
    file = None
    if text is not None:
        file = tmp_path / "node.toml"
        file.write_text(text)
    return load_settings(file, arguments=arguments, environment=environment)


def refusal(tmp_path: Path, text: str | None = STATE, *arguments: str, **environment: str) -> str:
    with pytest.raises(ConfigurationError) as error:
        told(tmp_path, text, *arguments, **environment)
    return str(error.value)


def at(settings: object, key: tuple[str, ...]) -> Any:
    for name in key:
        settings = getattr(settings, name)
    return settings


def test_the_printed_file_says_the_defaults(tmp_path: Path) -> None:
    printed = told(tmp_path, default_file())
    assert printed == NodeSettings(state_dir=printed.state_dir)


def test_every_option_stands_in_the_printed_file_with_what_it_is_for(tmp_path: Path) -> None:
    text = default_file()
    for option in options():
        name = option.key[-1]
        if name not in {"destinations", "rules"}:
            assert re.search(rf"(?m)^#?{name} = ", text), option.key
        assert len(option.about.split()) > 1, f"{option.flag} has no docstring"
        start = option.about.replace("`", "").split()[:3]
        assert re.search(r"\s+(# )?".join(map(re.escape, start)), text), option.about
    assert max(map(len, text.splitlines())) <= 100
    assert all(re.match(r"# |#$|#?\[|#?\w+ = |$", line) for line in text.splitlines())


def test_what_is_commented_out_is_valid_where_it_stands(tmp_path: Path) -> None:
    text = re.sub(r"(?m)^#(?=\w|\[)", "", default_file())
    text = re.sub(r"(?m)^secret(_variable)? = .*\n", "", text)  # one of the three
    secret = tmp_path / "secret"
    secret.write_text("told by a file\n")
    settings = told(tmp_path, text.replace("/etc/pe-infer/console.secret", str(secret)))
    assert [type(destination) for destination in settings.destinations] == [
        DicomDestination,
        FolderDestination,
        WebhookDestination,
    ]
    assert settings.destinations[2].secret.get_secret_value() == "told by a file"  # type: ignore[union-attr]
    assert settings.listen.tls is not None
    assert settings.engine.threads is not None
    assert all(value is not None for value in settings.routing.rules[0].model_dump().values())


def test_a_flag_goes_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    text = STATE + "[listen]\nport = 1\nassociations = 2\nidle_s = 3\n"
    variables = {"PE_INFER_NODE__LISTEN__PORT": "10", "PE_INFER_NODE__LISTEN__ASSOCIATIONS": "20"}
    settings = told(tmp_path, text, "--listen.port", "100", **variables, PATH="/bin")
    listen = settings.listen
    assert (listen.port, listen.associations, listen.idle_s) == (100, 20, 3.0)


@pytest.mark.parametrize("option", options(), ids=lambda option: option.flag)
def test_every_option_is_a_flag_and_a_variable(tmp_path: Path, option: Any) -> None:
    values = {
        "--destinations": '[{"kind": "folder", "name": "a", "path": "/a"}]',
        "--routing.rules": '[{"bundle": "ignore", "modality": "CT"}]',
        "--listen.allowed_ae_titles": "CT_1,CT_2",
        "--listen.allowed_addresses": "10.0.0.0/8,fd00::/8",
        "--routing.bundles": '["ich"]',
        "--engine.precision": "float32",
        "--routing.otherwise": "ignore",
        "--operations.log_level": "debug",
        "--operations.log_format": "text",
        "--retention.hours": "never",
    }
    known = tomllib.loads(re.sub(r"(?m)^#(?=\w|\[)", "", default_file()))
    example = known
    for name in option.key:
        example = example[name]
    value = values.get(option.flag, str(example))
    rest = {o.key: "x" for o in options() if "tls" in o.key and "tls" in option.key}
    rest |= {("state_dir",): "/state"}
    rest |= {option.key: value}
    flags = [f"--{'.'.join(key)}={value}" for key, value in rest.items()]
    by_flag = told(tmp_path, None, *flags)
    variables = {"PE_INFER_NODE__" + "__".join(key).upper(): v for key, v in rest.items()}
    assert told(tmp_path, None, **variables) == by_flag
    assert at(by_flag, option.key) is not None
    if option.flag in values:
        assert at(by_flag, option.key) != option.default


def test_flags_may_be_written_with_hyphens_and_with_or_without_a_sign(tmp_path: Path) -> None:
    settings = told(tmp_path, None, "--state-dir", "/a", "--limits.waiting-slices=7")
    assert (settings.state_dir, settings.limits.waiting_slices) == (Path("/a"), 7)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[listen]\nprot = 3", ["node.toml: listen.prot", "Did you mean port?"]),
        ("lissten = 3", ["node.toml: lissten", "Did you mean listen?"]),
        ("[listen]\nport = 70000", ["node.toml: listen.port = 70000", "65535"]),
        ('[listen]\nae_title = "MUCH_TOO_LONG_TITLE"', ["listen.ae_title", "16 characters"]),
        ('[[destinations]]\nkind = "ftp"', ["destinations.0", "'dicom', 'folder', 'webhook'"]),
        (
            '[[destinations]]\nkind = "folder"\nname = "a"\npaht = "/a"',
            ["destinations.0.path: is missing", "destinations.0.paht", "Did you mean path?"],
        ),
        (
            2 * '[[destinations]]\nkind = "folder"\nname = "a"\npath = "/a"\n',
            ["destinations of one name: ['a']"],
        ),
        ('[retention]\nhours = "nver"', ["retention.hours = 'nver'", "'never'"]),
        ("listen = ", ["node.toml: is no TOML"]),
    ],
)
def test_a_refusal_names_file_option_value_and_remedy(
    tmp_path: Path, text: str, said: list[str]
) -> None:
    message = refusal(tmp_path, STATE + text)
    assert all(part in message for part in said), message


def test_a_refusal_names_the_flag_or_the_variable(tmp_path: Path) -> None:
    assert "--listen.port = 'x'" in refusal(tmp_path, STATE, "--listen.port", "x")
    variable = "PE_INFER_NODE__LISTEN__PORT"
    assert f"{variable} = 'x'" in refusal(tmp_path, STATE, **{variable: "x"})
    assert "Did you mean --listen.port" in refusal(tmp_path, STATE, "--listen.prot", "3")
    message = refusal(tmp_path, STATE, PE_INFER_NODE__LISTEN__PROT="3")
    assert "Did you mean PE_INFER_NODE__LISTEN__PORT" in message
    assert "state_dir: is missing" in refusal(tmp_path, None)
    assert "--listen.port: needs a value" in refusal(tmp_path, STATE, "--listen.port")
    assert "node.toml" in refusal(tmp_path, STATE, "node.toml")
    with pytest.raises(ConfigurationError, match=r"nowhere\.toml: cannot be read"):
        load_settings(tmp_path / "nowhere.toml", environment={})


def test_a_secret_comes_from_a_file_or_the_environment_and_is_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = STATE + '[[destinations]]\nkind = "webhook"\nname = "a"\nurl = "http://a"\n'
    monkeypatch.setenv("HOOK", "by variable")
    settings = told(tmp_path, hook + 'secret_variable = "HOOK"')
    assert settings.destinations[0].secret.get_secret_value() == "by variable"  # type: ignore[union-attr]
    assert "by variable" not in repr(settings)
    assert "does not have it" in refusal(tmp_path, hook + 'secret_variable = "UNSET_HOOK"')
    assert "secret_file=" in refusal(tmp_path, hook + f'secret_file = "{tmp_path}/no"')
    wrong = hook.replace("http://a", "ftp://a") + 'secret = "hidden"\nsecret_file = "/x"'
    assert "hidden" not in refusal(tmp_path, wrong)
    assert "hidden" not in refusal(tmp_path, hook + 'secret = ["hidden"]')
