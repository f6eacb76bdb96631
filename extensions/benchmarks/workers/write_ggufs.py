"""Makes GGUF files of other types from one, in the interpreter that has llama-cpp-python, and links that one."""

import ctypes
from pathlib import Path

import llama_cpp
from timing import read_job, report

TYPES = {"bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16, "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}


def main() -> None:
    job = read_job()
    source, folder = Path(job["source"]), Path(job["out_dir"])
    for name, ftype in TYPES.items():
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = ftype, True
        target = folder / f"{name}.gguf"
        error = llama_cpp.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(options))
        if error:
            raise RuntimeError(f"llama.cpp did not write {target}: error {error}")
    (folder / "shipped.gguf").symlink_to(source)
    report({"files": len(TYPES)})


if __name__ == "__main__":
    main()
