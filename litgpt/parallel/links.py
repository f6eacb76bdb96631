"""How the GPUs of a machine are connected, according to their vendor's tool."""

import os
import re
import subprocess
from typing import Any

import torch

# word in a GPU's name -> the vendor's command for a table of links, the name of the fast link, its cells in the table
_NVIDIA = ["nvidia-smi", "topo", "-m"], "NVLink", re.compile(r"NV\d+")
_AMD = ["rocm-smi", "--showtopotype"], "XGMI", re.compile("XGMI")
_VENDORS = {"nvidia": _NVIDIA, "amd": _AMD, "advanced micro devices": _AMD}
_ESCAPE = re.compile(r"\x1b\[[\d;]*m")


def check_nvlink_connectivity(fabric: Any = None) -> None:
    """Print, in the first process, whether all GPUs are connected to each other by NVLink (AMD: XGMI).

    With a Lightning `fabric` its `print` is used.
    """
    if os.environ.get("RANK", "0") == "0":
        (print if fabric is None else fabric.print)(_connectivity())


def _connectivity() -> str:
    if not torch.cuda.is_available():
        return "No GPUs available"
    gpu = torch.cuda.get_device_properties(0).name
    vendor = next((vendor for word, vendor in _VENDORS.items() if word in gpu.lower()), None)
    if vendor is None:
        return f"Unrecognized GPU vendor: {gpu}"
    command, link, fast = vendor
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        return f"Failed to run {command[0]}: {error}"
    if result.returncode:
        return f"Failed to run {command[0]}"
    links = links_between_gpus(result.stdout)
    if links is None:
        return f"Failed to parse {command[0]} output"
    if all(fast.fullmatch(cell) for i, row in enumerate(links) for j, cell in enumerate(row) if i != j):
        return f"All GPUs are fully connected via {link}."
    return (
        f"Warning: Not all GPUs are fully connected via {link}. Some GPUs are connected via slower interfaces. It is "
        "recommended to switch to a different machine with faster GPU connections for optimal multi-GPU training performance."
    )


def links_between_gpus(table: str) -> list[list[str]] | None:
    """The cells (GPUs x GPUs) of a table with a column and a row for every GPU (None: there is no such table)."""
    lines = [_ESCAPE.sub("", line).split() for line in table.splitlines()]
    header = next((i for i, words in enumerate(lines) if words[:1] == ["GPU0"]), None)
    if header is None:
        return None
    count = sum(re.fullmatch(r"GPU\d+", word) is not None for word in lines[header])
    rows = [words[1 : 1 + count] for words in lines[header + 1 :] if words and re.fullmatch(r"GPU\d+", words[0])]
    return rows if len(rows) == count and all(len(row) == count for row in rows) else None
