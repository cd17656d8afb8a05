"""The program ``pe-infer``: its commands, and how errors become exit codes."""

import sys
from importlib.metadata import version
from typing import Annotated, Final

import typer

from pe_infer.cli import bundles_command, node_command
from pe_infer.cli.build_command import build_command
from pe_infer.cli.demo_command import demo_command
from pe_infer.cli.detect_command import detect_command
from pe_infer.cli.doctor_command import doctor_command
from pe_infer.cli.inspect_command import inspect_command
from pe_infer.cli.layout import printable
from pe_infer.cli.phantom_command import phantom_command
from pe_infer.cli.serve_command import serve_command
from pe_infer.errors import ConfigurationError, PeInferError

_EXIT_CODES: Final = (
    "Exit status: 0 a result; 1 internal error; 2 usage or settings; 3 input cannot be used; "
    "4 study out of the bundle's scope; 5 bundle; 6 engine; 7 stream; 8 node; 10 the study was "
    "not processed; 130 interrupted."
)

app = typer.Typer(
    name="pe-infer",
    help="Streaming CNN + RNN inference beside a CT scanner. Research use only.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo_command)
app.command("detect")(detect_command)
app.command("inspect")(inspect_command)
app.command("phantom")(phantom_command)
app.add_typer(bundles_command.app, name="bundles")
app.command("build")(build_command)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    serve_command
)
app.add_typer(node_command.app, name="node")
app.command("doctor")(doctor_command)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 (typer calls it)
    if wanted:
        typer.echo(f"pe-infer {version('pe-infer')}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options before any command."""


def main() -> None:
    """Run the command line; an error raised on purpose ends with its exit code and one message.

    Typer itself ends with 130 when interrupted, and silently when nobody reads the output any more.
    """
    try:
        app()
    except PeInferError as error:
        message = printable(str(error))
        print(f"pe-infer: error [{error.code}] {message}", file=sys.stderr)  # noqa: T201
        raise SystemExit(error.exit_code) from None
    except OSError as error:  # an output that cannot be written
        if error.filename is None:
            raise
        message = printable(f"{error.filename}: {error.strerror}")
        print(f"pe-infer: error: {message}", file=sys.stderr)  # noqa: T201
        raise SystemExit(ConfigurationError.exit_code) from error
