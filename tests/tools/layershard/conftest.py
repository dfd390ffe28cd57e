# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the tests of tools/layershard."""

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "support"))
pytest.register_assert_rewrite("programs")
from programs import program_named  # noqa: E402, F401


@pytest.fixture(scope="session")
def program():
    return program_named("layershard")
