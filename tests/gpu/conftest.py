"""The device under test."""

import os

import pytest
import torch

NAME = os.environ.get("LITGPT_TEST_DEVICE", "cuda")


@pytest.fixture
def device():
    return torch.device(NAME)


@pytest.fixture
def on_gpu(device):
    """For what a CPU has not."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device
