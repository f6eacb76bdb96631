"""Numbers for Prometheus, in its text format."""

from collections import Counter

from litgpt.engine.service import Service
from litgpt.serve.served import ServedModel


def prometheus(service: Service | None, models: dict[str, ServedModel], requests: Counter[tuple[str, int]]) -> str:
    """All metrics of the server."""
    lines: list[str] = []

    def metric(name: str, kind: str, help: str, values: dict[str, float]) -> None:
        lines.extend([f"# HELP litgpt_{name} {help}", f"# TYPE litgpt_{name} {kind}"])
        lines.extend(f"litgpt_{name}{labels} {value}" for labels, value in values.items())

    by_label = {f'{{path="{path}",status="{status}"}}': count for (path, status), count in sorted(requests.items())}
    metric("requests_total", "counter", "Requests by path and status (0: the client left).", by_label)
    if service is not None:
        waiting = service.waiting
        metric("requests_waiting", "gauge", "Answers that wait for a row.", {"": waiting})
        metric("requests_running", "gauge", "Answers that are generated.", {"": max(0, service.unfinished - waiting)})
        metric("generated_tokens_total", "counter", "Tokens of answers.", {"": service.n_generated})
        metric("failed_steps_total", "counter", "Steps that failed.", {"": service.n_failures})
    stores = {f'{{model="{name}"}}': one.prefixes for name, one in models.items() if one.prefixes is not None}
    for name, kind, help, attribute in (
        ("prefix_lookups_total", "counter", "Prompts that were looked up.", "n_lookups"),
        ("prefix_hits_total", "counter", "Prompts of which a beginning was kept.", "n_hits"),
        ("prefix_reused_tokens_total", "counter", "Tokens that were not computed again.", "n_reused_tokens"),
        ("prefix_bytes", "gauge", "Bytes of kept states.", "n_bytes"),
    ):
        metric(name, kind, help, {labels: getattr(store, attribute) for labels, store in stores.items()})
    return "\n".join(lines) + "\n"
