"""Encoded samples go into a folder of the test's own."""

import pytest


@pytest.fixture(autouse=True)
def _own_cache(own_cache):
    pass
