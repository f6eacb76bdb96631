"""Where the GGUF file of a checkpoint is."""

from timing import read_job, report

from litgpt.checkpoint.find import find_checkpoint


def main() -> None:
    path = find_checkpoint(read_job()["checkpoint"]).resolve()
    if path.suffix != ".gguf":
        raise ValueError(
            f"llama.cpp needs a .gguf file, not {path}; name one by --checkpoint, or leave llama out of --systems"
        )
    report({"gguf": str(path)})


if __name__ == "__main__":
    main()
