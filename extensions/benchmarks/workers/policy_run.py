"""Reads a text through one cache: speeds, bytes of the caches, and the peak of memory above the model."""

from timing import read_job, report

from litgpt.api import LLM
from litgpt.comparison.speed import measure_speed
from litgpt.kvcache import CacheSpec
from litgpt.tasks.document import read_document


def main() -> None:
    job = read_job()
    llm = LLM.load(job["checkpoint"], precision="bf16-true")
    tokens = llm.tokenizer.encode(read_document(None)).tolist()[: job["tokens"]]
    spec = CacheSpec.parse(job["kv_cache"], job["slots"])
    report(
        measure_speed(llm, spec, tokens, job["chunk"], job["decoded"]) | {"estimated": spec.size(llm.model, 1)[0] // 8}
    )


if __name__ == "__main__":
    main()
