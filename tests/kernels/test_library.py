"""The kernels compile: other tests skip what they cannot compute with."""

import pytest

from litgpt.kernels import processor
from litgpt.kernels.library import float32_library, library
from litgpt.kernels.toolchain import toolchain

pytestmark = pytest.mark.skipif(
    processor.instruction_set() is None or toolchain().compiler() is None, reason="kernels are off, or have no compiler"
)


@pytest.mark.parametrize("load", [library, float32_library])
def test_it_compiles(load):
    assert load() is not None
