"""One conversion by the `litgpt` of the interpreter that runs it, this package or LitGPT: both have these functions."""

import resource
import time
from pathlib import Path

from timing import peak_bytes, read_job, report

from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint


def cpu_seconds() -> float:
    """Of all threads of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    job, imported = read_job(), peak_bytes()
    folder = Path(job["folder"])
    cpu, started = cpu_seconds(), time.perf_counter()
    if job["command"] == "convert_to_litgpt":
        convert_hf_checkpoint(folder / "model", model_name=job["model"])
    else:
        convert_lit_checkpoint(folder / "model", folder / "back")
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    report(
        {
            "s": seconds,
            "CPU s": cpu,
            "peak memory, MB": peak_bytes() / 1e6,
            "peak memory above imports, MB": (peak_bytes() - imported) / 1e6,
        }
    )


if __name__ == "__main__":
    main()
