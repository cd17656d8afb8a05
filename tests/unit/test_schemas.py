"""The published schemas are those of the code."""

from pathlib import Path

import jsonschema
import pytest

from pe_infer.schemas import SCHEMAS, schema_text

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_published_schema_is_current(name: str) -> None:
    assert (DOCS / name).read_text() == schema_text(name), "run `make schemas`"


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_published_schema_is_valid(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name]())
