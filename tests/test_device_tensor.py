"""Tensors of numbers that the host knows."""

import torch

from litgpt.device_tensor import position_tensor


def test_a_position_is_a_tensor_of_one_number_also_beyond_those_that_were_asked_for_before():
    device = torch.device("cpu")
    with torch.inference_mode():
        for position in (0, 5, 7000, 1023, 1_000_000, 20_000):
            found = position_tensor(position, device)
            assert (found.tolist(), found.dtype) == ([position], torch.int64)
    assert not position_tensor(3, device).is_inference(), "calls with gradients use it too"
