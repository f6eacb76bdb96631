"""llama.cpp by llama-cpp-python: evaluation and the largest of the last logits, nothing around them."""

from collections.abc import Iterator

import llama_cpp
import numpy as np
from timing import measure, peak_bytes, read_job, read_tokens, report


def main() -> None:
    job, imported = read_job(), peak_bytes()
    prompt, threads = read_tokens(job, job["context"]), job["threads"]
    model = llama_cpp.Llama(
        job["checkpoint"],
        n_ctx=len(prompt) + job["new_tokens"] + 1,
        n_threads=threads,
        n_threads_batch=threads,
        # llama.cpp's own defaults, which are faster than those of the package
        n_batch=2048,
        flash_attn=True,
        verbose=False,
    )
    logits_shape = (model.n_vocab(),)

    def generate() -> Iterator[int]:
        model.reset()
        tokens = prompt
        for _ in range(1 + job["new_tokens"]):
            model.eval(tokens)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), logits_shape)
            tokens = [int(logits.argmax())]
            yield tokens[0]

    result = measure(job, imported, llama_cpp.llama_n_threads(model.ctx), generate)
    features = llama_cpp.llama_print_system_info().decode().strip(" |").replace(" = 1", "").replace(" | ", ", ")
    report(result | {"note": f"compiled for {features}"})


if __name__ == "__main__":
    main()
