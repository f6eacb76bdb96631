"""Measures what training through a cache wins back of what the cache costs: perplexity of prose, and numbers found in it.

    python extensions/benchmarks/adapting_to_caches.py SmolLM2-135M-Instruct --out adapting

A model is measured with every cache (a) as it is, (b) after plain LoRA, (c) after LoRA through that cache and (d) after
self-distillation through it, all on the same texts, in the same order and number of steps. What has been measured stays in the
folder, and is not measured again: the command can be stopped at any time. See README.md.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from math import exp
from pathlib import Path
from random import Random
from statistics import mean, stdev

WAYS = {
    "before": "as it is",
    "plain": "after plain LoRA",
    "cached": "after LoRA through the cache",
    "distilled": "after self-distillation",
}
LORA = {"lora_r": 16, "lora_alpha": 32, "lora_all": True}
WARMUP, HELD_OUT = 2, 0.15  # steps; the last part of the text, which is measured and not learned


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "runs", "seeds", "caches")}
    check_settings(args.out / "settings.json", settings)
    left = [run for run in all_runs(args) if not run_path(args.out, *run).exists()]
    for way, cache, seed in left[: args.runs]:
        began = time.perf_counter()
        result = measure(args, way, cache, seed)
        result |= {"way": way, "cache": cache, "seed": seed, "seconds": time.perf_counter() - began}
        write(run_path(args.out, way, cache, seed), json.dumps(result, indent=1))
        print(way, cache or "", seed, f"{result['seconds']:.0f} s", json.dumps(result["figures"]), flush=True)
    results = [json.loads(path.read_text()) for path in sorted(args.out.glob("run-*.json"))]
    if len(left) <= (args.runs or len(left)):
        table = markdown(results)
        print(table)
        write(args.out / "table.md", table)
        write(args.out / "plot.svg", plot(results))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", help="folder of a checkpoint, or the name of a model")
    add("--out", type=Path, required=True, help="folder of what has been measured")
    add("--text", type=Path, help="prose to learn and to measure (default: Python's reference, which comes with it)")
    add("--caches", default="lastrec,snapkv,h2o", help="separated by commas (default: %(default)s)")
    add("--length", type=int, default=4000, help="tokens of a text (default: %(default)s)")
    add("--cache_length", type=int, default=256, help="slots (default: %(default)s)")
    add("--tail", type=int, help="tokens between evictions of caches that score them (default: theirs)")
    add("--chunk", type=int, default=256, help="tokens that enter a cache together (default: %(default)s)")
    add("--steps", type=int, default=200, help="of one text each, prose and questions in turn (default: %(default)s)")
    add("--learning_rate", type=float, default=1e-3, help="of AdamW (default: %(default)s)")
    add("--samples", type=int, default=32, help="texts that are measured, of each kind (default: %(default)s)")
    add("--seeds", default="0,1,2", help="of LoRA and of the texts, separated by commas (default: %(default)s)")
    add("--runs", type=int, help="measure at most so many things, and end (default: all)")
    return parser.parse_args()


def all_runs(args: argparse.Namespace) -> Iterator[tuple[str, str | None, int]]:
    yield "before", None, 0
    for seed in map(int, args.seeds.split(",")):
        yield "plain", None, seed
        for cache in args.caches.split(","):
            yield "cached", cache, seed
            yield "distilled", cache, seed


def run_path(out: Path, way: str, cache: str | None, seed: int) -> Path:
    return out / f"run-{'-'.join(filter(None, (way, cache, str(seed))))}.json"


def write(path: Path, text: str) -> None:
    """Write a file whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def check_settings(path: Path, settings: dict) -> None:
    """Note the settings of a folder; refuse others."""
    text = json.dumps(settings, indent=1, default=str)
    if path.exists() and path.read_text() != text:
        raise SystemExit(f"{path.parent} holds figures of other settings: name another folder")
    write(path, text)


def measure(args: argparse.Namespace, way: str, cache: str | None, seed: int) -> dict:
    """Train in a way, then measure with the cache, or with all of them."""
    import torch

    from litgpt import LLM
    from litgpt.kvcache import CacheSpec
    from litgpt.lora import Config, add_lora, mark_only_lora_as_trainable
    from litgpt.train.cached_layers import CachedLayers

    torch.manual_seed(seed)
    llm = LLM.load(args.checkpoint, precision="32-true")
    texts = Texts(llm, args)
    model = llm.prepare_for_training()
    specs = {name: CacheSpec.parse(name, args.cache_length) for name in ([cache] if cache else args.caches.split(","))}
    if args.tail is not None:
        specs = {
            name: CacheSpec.parse(spec, tail=args.tail) if "tail" in spec.policy_class.arguments() else spec
            for name, spec in specs.items()
        }
    layers = {name: CachedLayers(model, spec, args.chunk) for name, spec in specs.items()}
    result = {}
    if way != "before":
        add_lora(model, Config.extending(model.config, **LORA))
        mark_only_lora_as_trainable(model)
        result["losses"] = train(args, model, texts.batches(seed), layers[cache] if cache else None, way == "distilled")
    model.eval()
    if cache is None:
        layers = {"dense": CachedLayers(model, CacheSpec("dense"), args.chunk), **layers}
    return result | {"figures": {name: texts.measure(model, of_cache) for name, of_cache in layers.items()}}


def train(args: argparse.Namespace, model, batches, layers, distil: bool) -> list[float]:
    """LoRA on the batches, one a step. Returns their losses."""
    import torch

    from litgpt.train.model import TrainingModel
    from litgpt.train.teacher import Teacher

    training = TrainingModel(model.train(), layers is None, layers, Teacher(model, args.chunk) if distil else None)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, args.learning_rate, weight_decay=0.0), []
    for step in range(args.steps):
        ids, labels = next(batches)
        loss = training(ids, labels) / (labels >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        factor = min((step + 1) / WARMUP, (args.steps - step) / (args.steps - WARMUP + 1))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class Texts:
    """Prose and questions about prose, to learn and to measure."""

    def __init__(self, llm, args: argparse.Namespace) -> None:
        from litgpt.prompt_frame import PromptFrame
        from litgpt.tasks.document import lines_of, read_document
        from litgpt.tasks.retrieval import DEPTHS, retrieval
        from litgpt.tasks.sample import longest_prompt

        self.args, text = args, read_document(args.text)
        cut = round(len(text) * (1 - HELD_OUT))
        self.tokens = [llm.tokenizer.encode(part).long() for part in (text[:cut], text[cut:])]
        prose, frame = (
            [lines_of(part) for part in (text[:cut], text[cut:])],
            PromptFrame(llm.tokenizer, llm.prompt_style),
        )

        def prompt(part: int, seed: str):
            make = lambda n: retrieval((random := Random(seed)), n, prose[part], random.choice(DEPTHS))  # noqa: E731
            return longest_prompt(make, frame, args.length, "retrieval")

        self.prompt = prompt

    def batches(self, seed: int) -> Iterator[tuple]:
        """Tokens and labels of a text after the other: prose, then two questions about prose and their answers."""
        random, length, tokens = Random(seed), self.args.length, self.tokens[0]
        for i in range(self.args.steps):
            if i % 2:
                yield encoded(self.prompt(0, f"{seed} {i}"))[:2]
            else:
                start = random.randrange(len(tokens) - length)
                yield tokens[None, start : start + length], tokens[None, start + 1 : start + length + 1]

    def measure(self, model, layers) -> dict[str, float]:
        """Mean loss of the tokens of prose that come when a cache is full; of answers, the mean log-probability of their tokens
        and the share of those that a greedy answer gets right."""
        import torch

        args, tokens = self.args, self.tokens[1]
        room, losses, logprobs, right = len(tokens) - args.length - 1, [], [], []
        with torch.no_grad():
            for i in range(args.samples):
                start = i * room // args.samples
                part = tokens[start : start + args.length + 1]
                found = logits(model, layers, part[None, :-1], range(args.cache_length, args.length))
                losses.append(torch.nn.functional.cross_entropy(found, part[args.cache_length + 1 :]).item())
                ids, labels, answers = encoded(self.prompt(1, f"held out {i}"))
                scores = logits(model, layers, ids, range(answers[0].start, ids.shape[1])).log_softmax(-1)
                for answer in answers:
                    found = scores[answer.start - answers[0].start : answer.stop - answers[0].start]
                    wanted = labels[0, answer.start : answer.stop]
                    logprobs.append(found.gather(1, wanted[:, None]).mean().item())
                    right.append(float((found.argmax(-1) == wanted).all()))
        return {"loss": mean(losses), "logprob": mean(logprobs), "score": mean(right)}


def logits(model, layers, ids, places: range):
    """Logits (n, V) at places of a text."""
    return model.logits(layers(ids)[0, places.start : places.stop]).float()


def encoded(prompt) -> tuple:
    """Tokens, labels and the places of the answers of a prompt with its right answers."""
    import torch

    tokens, answers = list(prompt.context), []
    for i in range(len(prompt.sample.questions)):
        tokens += prompt.question(i)
        answers.append(range(len(tokens) - 1, len(tokens) - 1 + len(prompt.right(i))))
        tokens += prompt.right(i)
    ids = torch.tensor(tokens)[None]
    labels = torch.full_like(ids[:, :-1], -100)
    for answer in answers:
        labels[0, answer.start : answer.stop] = ids[0, answer.start + 1 : answer.stop + 1]
    return ids[:, :-1], labels, answers


def by_cache(results: list[dict]) -> dict[str, dict[str, list[dict]]]:
    """Figures of every seed, by cache and way."""
    found: dict[str, dict[str, list[dict]]] = {}
    for way in WAYS:
        for result in results:
            if result["way"] == way:
                for cache, figures in result["figures"].items():
                    found.setdefault(cache, {}).setdefault(way, []).append(figures)
    return found


def markdown(results: list[dict]) -> str:
    """A table of all figures, means over the seeds, with the share of the cost that was won back."""
    found, lines = by_cache(results), []
    seeds = len({result["seed"] for result in results if result["way"] != "before"})
    lines += [f"| cache | {' | '.join(WAYS.values())} | won back |", "|---" * (len(WAYS) + 2) + "|"]
    for name, figure in (("perplexity", "loss"), ("log-probability", "logprob"), ("answers right", "score")):
        for cache, ways in found.items():
            cells = [shown(figure, [x[figure] for x in ways.get(way, [])]) for way in WAYS]
            lines.append(f"| {cache}: {name} | {' | '.join(cells)} | {won_back(found, cache, figure)} |")
    return "\n".join([f"Means of {seeds} seed{'s' * (seeds != 1)}.", "", *lines, ""])


def shown(figure: str, values: list[float]) -> str:
    """Their mean, and how far they are apart."""
    if not values:
        return ""
    if figure == "loss":
        values = [exp(value) for value in values]
    text = f"{mean(values):.0%}" if figure == "score" else f"{mean(values):.2f}"
    spread = stdev(values) if len(values) > 1 else 0.0
    return text + (f" ± {spread:.0%}" if figure == "score" and spread else f" ± {spread:.2f}" if spread else "")


def won_back(found: dict, cache: str, figure: str) -> str:
    """What the better of (c) and (d) wins back of what the cache costs after plain LoRA: the difference to a dense cache."""
    ways = found[cache]
    if "cached" not in ways or "plain" not in ways:
        return ""
    value = lambda of: mean(x[figure] for x in of)  # noqa: E731
    plain, dense = value(ways["plain"]), value(found["dense"]["plain"])
    sign = -1 if figure == "loss" else 1
    best = max((value(ways[way]) for way in ("cached", "distilled") if way in ways), key=lambda x: sign * x)
    return f"{(best - plain) / (dense - plain):.0%}" if sign * (dense - plain) > 1e-9 else "no cost"


def plot(results: list[dict]) -> str:
    """Bars by cache and way: perplexity of prose, and log-probability of answers; a line where the dense cache is."""
    found = by_cache(results)
    caches = [cache for cache in found if cache != "dense"]
    colours = ("#9aa4b2", "#e0a458", "#3b7dd8", "#2f9e6e")
    width, height, left, top, gap = 360, 200, 46, 34, 16
    parts = []
    for panel, (figure, title) in enumerate(
        (("loss", "perplexity (less is better)"), ("logprob", "log-probability of answers"))
    ):
        value = lambda of, figure=figure: mean(exp(x[figure]) if figure == "loss" else x[figure] for x in of)  # noqa: E731
        values = {(c, w): value(found[c][w]) for c in caches for w in WAYS if w in found[c]}
        lines = {w: value(found["dense"][w]) for w in ("before", "plain") if w in found["dense"]}
        ends = [*values.values(), *lines.values(), 0.0]
        low, high = min(ends), max(ends)
        y = lambda v, low=low, high=high: top + (height - top) * (high - v) / (high - low)  # noqa: E731
        x0 = panel * (width + 60) + left
        parts.append(f'<text x="{x0}" y="16">{title}</text>')
        group = (width - left) / len(caches)
        bar = (group - gap) / len(WAYS)
        for i, cache in enumerate(caches):
            parts.append(
                f'<text x="{x0 + i * group + (group - gap) / 2:.0f}" y="{height + 18}" text-anchor="middle">{cache}</text>'
            )
            for j, way in enumerate(WAYS):
                if (cache, way) in values:
                    v = values[cache, way]
                    a, b = sorted((y(v), y(0.0)))
                    parts.append(
                        f'<rect x="{x0 + i * group + j * bar:.1f}" y="{a:.1f}" width="{bar - 2:.1f}" height="{max(b - a, 0.5):.1f}" '
                        f'fill="{colours[j]}"><title>{cache}, {WAYS[way]}: {v:.2f}</title></rect>'
                    )
        for way, v in lines.items():
            parts.append(
                f'<line x1="{x0}" x2="{x0 + width - left}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="{colours[list(WAYS).index(way)]}" '
                f'stroke-dasharray="5 3"><title>dense cache, {WAYS[way]}: {v:.2f}</title></line>'
            )
        for v in {low, high, *lines.values()}:
            parts.append(f'<text x="{x0 - 4}" y="{y(v) + 4:.1f}" text-anchor="end" font-size="10">{v:.3g}</text>')
    for j, words in enumerate(WAYS.values()):
        x = left + j * 190
        parts.append(f'<rect x="{x}" y="{height + 34}" width="10" height="10" fill="{colours[j]}"/>')
        parts.append(f'<text x="{x + 15}" y="{height + 43}">{words}</text>')
    size = f'viewBox="0 0 {2 * width + 90} {height + 56}" width="{2 * width + 90}" height="{height + 56}"'
    style = 'font-family="sans-serif" font-size="12" fill="#555"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><g {style}>{"".join(parts)}</g></svg>\n'


if __name__ == "__main__":
    main()
