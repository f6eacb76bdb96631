"""Decodes through several caches in turn, in one process: tokens a second of each in every round."""

from time import perf_counter

from timing import read_job, report

from litgpt.api import LLM
from litgpt.kvcache import CacheSpec
from litgpt.tasks.document import read_document


def main() -> None:
    job = read_job()
    llm = LLM.load(job["checkpoint"], precision="bf16-true")
    tokens = llm.tokenizer.encode(read_document(None)).tolist()[: job["tokens"]]
    sessions = {}
    for name, slots in job["caches"].items():
        sessions[name] = llm.session(CacheSpec.parse(name, slots), prompt_chunksize=job["chunk"])
        sessions[name].extend(tokens)
    speeds: dict[str, list[float]] = {name: [] for name in sessions}
    for round_idx in range(job["rounds"] + 1):  # the first one to warm up
        for name in list(sessions) if round_idx % 2 else list(sessions)[::-1]:
            session, started = sessions[name], perf_counter()
            n = sum(1 for _ in session.generate(max_new_tokens=job["decoded"], temperature=0.0))
            speeds[name].append(n / (perf_counter() - started))
            if session.limit is not None and len(session.tokens) + job["decoded"] > session.limit:
                session.crop(len(tokens) - 1)
                session.extend(tokens[-1:])  # computes again, unmeasured, what was evicted
    report({name: found[1:] for name, found in speeds.items()})


if __name__ == "__main__":
    main()
