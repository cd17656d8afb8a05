"""Toy bundles that several tests of programs share."""

import pytest
import toy_bundles as toy

from pe_infer.bundle import Bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy.write_toy(tmp_path_factory.mktemp("bundles") / "pe_like")


@pytest.fixture(scope="session")
def both_ways(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy.write_toy(tmp_path_factory.mktemp("bundles") / "radnet_like", "radnet_like")
