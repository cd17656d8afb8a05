"""``python -m pe_infer.schemas FOLDER``: write the published JSON schemas."""

import json
import sys
from pathlib import Path

from pe_infer.certificate import certificate_schema
from pe_infer.engine_manifest import engine_schema
from pe_infer.manifest import manifest_schema
from pe_infer.result import result_schema

SCHEMAS = {
    "bundle.schema.json": manifest_schema,
    "certificate.schema.json": certificate_schema,
    "engines.schema.json": engine_schema,
    "result.schema.json": result_schema,
}


def schema_text(name: str) -> str:
    """The text of a published schema file."""
    return json.dumps(SCHEMAS[name](), indent=1) + "\n"


def main() -> None:
    """Write all schemas to the folder given."""
    if len(sys.argv) != 2 or not (folder := Path(sys.argv[1])).is_dir():  # noqa: PLR2004
        raise SystemExit("usage: python -m pe_infer.schemas FOLDER, of a folder that is there")
    for name in SCHEMAS:
        (folder / name).write_text(schema_text(name), encoding="utf-8")


if __name__ == "__main__":
    main()
