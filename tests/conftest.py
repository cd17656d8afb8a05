"""Fixtures for all tests."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: machines are noisy. The same examples every time in CI, new ones elsewhere.
settings.register_profile("pe_infer", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("pe_infer")

SHARED_DATA_VARIABLE = "PE_INFER_DATA"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real CT data, which is not in this repository; skip without it."""
    named = os.environ.get(SHARED_DATA_VARIABLE)
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real CT data not found in {folder}: set {SHARED_DATA_VARIABLE} to its folder")
    return folder


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, even where a shell has started the tests in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
