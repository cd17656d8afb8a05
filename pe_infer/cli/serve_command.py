"""``pe-infer serve``: the DICOM node beside the scanner."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from pe_infer.cli.layout import open_console, print_table
from pe_infer.cli.node_extra import require_node_extra
from pe_infer.errors import ConfigurationError, NodeError


def serve_command(
    context: typer.Context,
    *,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="TOML; --print-config writes one."),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option(
            "--print-config", help="Print the default file, every option with what it is for."
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Load bundles and certificates, look whether the ports are free, ask the "
            "destinations by C-ECHO, print what was found and end. Exit status 8: something is "
            "not as it should be.",
        ),
    ] = False,
) -> None:
    """Receive CT slices by C-STORE, judge series as they arrive, send what was found.

    Every option of the file is also a flag, --section.option VALUE (--listen.port 11113), and an
    environment variable, PE_INFER_NODE__SECTION__OPTION. Flags go before variables, variables
    before the file. SIGTERM and SIGINT end the node in good order, a second one at once; what was
    in progress goes on at the next start.
    """
    require_node_extra("serve")
    from pe_infer.node import configuration  # noqa: PLC0415  needs the extra

    if print_config:
        if config is not None or check or context.args:
            raise ConfigurationError(
                "--print-config prints the defaults: leave out everything else"
            )
        typer.echo(configuration.default_file(), nl=False)
        return
    settings = configuration.load_settings(config, arguments=context.args, environment=os.environ)
    if check:
        from pe_infer.node.preflight import examine  # noqa: PLC0415  needs the extra

        findings = list(examine(settings))
        marks = {True: Text("ok"), False: Text("FAILED", style="red")}
        rows = [(found.what, marks[found.good], found.detail) for found in findings]
        print_table(open_console(), ("", "", ""), rows)
        if not all(found.good for found in findings):
            raise typer.Exit(NodeError.exit_code)
        return
    from pe_infer.node.service import serve  # noqa: PLC0415  needs the extra

    serve(settings)
