"""Build hook: compiles ``cpp_ext/`` with CMake; everything else is in ``pyproject.toml``."""

from scikit_build_core.setuptools.wrapper import setup

setup(cmake_source_dir=".")
