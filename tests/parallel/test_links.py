"""Tables are what `nvidia-smi topo -m` and `rocm-smi --showtopotype` print."""

import subprocess
from types import SimpleNamespace

import pytest
import torch

from litgpt.parallel.links import check_nvlink_connectivity, links_between_gpus

NVIDIA = """
\x1b[4mGPU0    GPU1    NIC0    CPU Affinity    NUMA Affinity   GPU NUMA ID\x1b[0m
GPU0     X      {0}     SYS     0-15    0               N/A
GPU1    {0}      X      SYS     0-15    0               N/A
NIC0    SYS     SYS      X

Legend:
  NV#  = Connection traversing a bonded set of # NVLinks
"""
AMD = """
=========================== Link Type between two GPUs ===========================
       GPU0         GPU1
GPU0   0            {0}
GPU1   {0}         0
"""


@pytest.mark.parametrize(
    ("gpu", "table", "command", "said"),
    [
        ("NVIDIA H100", NVIDIA.format("NV18"), "nvidia-smi", "All GPUs are fully connected via NVLink."),
        ("NVIDIA A10G", NVIDIA.format("PHB"), "nvidia-smi", "Warning: Not all GPUs are fully connected via NVLink."),
        ("NVIDIA A10G", "no table", "nvidia-smi", "Failed to parse nvidia-smi output"),
        ("AMD Instinct MI300X", AMD.format("XGMI"), "rocm-smi", "All GPUs are fully connected via XGMI."),
        ("AMD Instinct MI300X", AMD.format("PCIE"), "rocm-smi", "Warning: Not all GPUs are fully connected via XGMI."),
        ("Homemade", "", None, "Unrecognized GPU vendor: Homemade"),
    ],
)
def test_it_says_whether_all_gpus_have_fast_links(gpu, table, command, said, monkeypatch, capsys):
    def run(args, **kwargs):
        assert args[0] == command
        return SimpleNamespace(stdout=table, returncode=0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name=gpu))
    monkeypatch.setattr(subprocess, "run", run)
    check_nvlink_connectivity()
    assert capsys.readouterr().out.startswith(said)
    monkeypatch.setenv("RANK", "1")
    check_nvlink_connectivity()
    assert capsys.readouterr().out == ""


def test_without_gpus_and_without_the_tool_it_says_so(monkeypatch):
    said = []
    fabric = SimpleNamespace(print=said.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_nvlink_connectivity(fabric)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="NVIDIA"))
    monkeypatch.setenv("PATH", "")
    check_nvlink_connectivity(fabric)
    assert said[0] == "No GPUs available"
    assert said[1].startswith("Failed to run nvidia-smi")


def test_cells_are_those_between_gpus():
    assert links_between_gpus(NVIDIA.format("NV1")) == [["X", "NV1"], ["NV1", "X"]]
    assert links_between_gpus("GPU0 GPU1\nGPU0 X NV1\n") is None
