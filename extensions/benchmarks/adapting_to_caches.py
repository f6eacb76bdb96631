"""Measures what training through a cache wins back of what the cache costs: perplexity of prose, and numbers found in it.

    python extensions/benchmarks/adapting_to_caches.py SmolLM2-135M-Instruct --out adapting

A model is measured with every cache (a) as it is, (b) after plain LoRA, (c) after LoRA through that cache and (d) after
self-distillation through it, all on the same texts, in the same order and number of steps. Finished runs stay in `runs.jsonl`
of the folder and are not repeated, and training goes on where it was stopped: the command can be ended at any time. See README.md.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import mean

from adapting_table import WAYS, markdown, plot

LORA = {"lora_r": 16, "lora_alpha": 32, "lora_all": True}
WARMUP, HELD_OUT = 2, 0.15  # steps; the last part of the text, which is measured and not learned
SAVE_SECONDS = 60  # of training, that a stop loses at most
NO_SETTINGS = ("out", "caches", "seeds", "ways", "minutes", "table")  # of runs: the same figures with others
RUNS = "runs.jsonl"


class OutOfTime(Exception):
    """`--minutes` have passed."""


def main() -> None:
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(
        json.dumps({name: value for name, value in vars(args).items() if name not in NO_SETTINGS}, default=str)
    )
    runs = read_runs(args.out / RUNS)
    if other := next((run for run in runs if not args.table and run["settings"] != settings), None):
        names = [name for name in settings if settings[name] != other["settings"].get(name)]
        raise SystemExit(f"{args.out / RUNS} has runs with other settings ({', '.join(names)}): name another --out")
    deadline = time.monotonic() + 60 * args.minutes if args.minutes is not None else float("inf")
    try:
        for way, cache, seed in [] if args.table else all_runs(args):
            if not any((run["way"], run["cache"], run["seed"]) == (way, cache, seed) for run in runs):
                began = time.perf_counter()
                run = {"way": way, "cache": cache, "seed": seed, **measure(args, way, cache, seed, deadline)}
                run |= {"seconds": time.perf_counter() - began, "settings": settings}
                append(args.out / RUNS, run)
                print(way, cache, seed, f"{run['seconds']:.0f} s", json.dumps(run["figures"]), flush=True)
    except OutOfTime:
        print("--minutes have passed: the same command goes on")
    runs = read_runs(args.out / RUNS)
    if runs:
        table = markdown(runs)
        print(table)
        replace(args.out / "table.md", table)
        replace(args.out / "plot.svg", plot(runs))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", help="folder of a checkpoint, or the name of a model")
    add("--out", type=Path, required=True, help="folder of what has been measured")
    add("--text", type=Path, help="prose to learn and to measure (default: Python's reference, which comes with it)")
    add("--caches", default="lastrec,snapkv,h2o", help="separated by commas (default: %(default)s)")
    add("--ways", default=",".join(WAYS), help="separated by commas (default: %(default)s)")
    add("--length", type=int, default=4000, help="tokens of a text that is measured (default: %(default)s)")
    add("--train_length", type=int, help="tokens of a text that is learned (default: those of --length)")
    add("--cache_length", type=int, default=256, help="slots (default: %(default)s)")
    add("--tail", type=int, help="tokens between evictions of caches that score them (default: theirs)")
    add("--chunk", type=int, default=256, help="tokens that enter a cache together (default: %(default)s)")
    add("--steps", type=int, default=200, help="of one text each, prose and questions in turn (default: %(default)s)")
    add("--numbers", type=int, default=2, help="in a learned text, each asked for, at most (default: %(default)s)")
    add("--learning_rate", type=float, default=1e-3, help="of AdamW (default: %(default)s)")
    add("--keep_loss", type=float, default=0.0, help="weight of a loss on what is kept (default: %(default)s)")
    add("--falling", action="store_true", help="let the weight of --keep_loss fall to 0 over the steps")
    add("--samples", type=int, default=32, help="texts that are measured (default: %(default)s)")
    add("--precision", default="bf16-true", help="of the model; LoRA is updated in float32 (default: %(default)s)")
    add("--seeds", default="0,1,2", help="of LoRA and of the texts, separated by commas (default: %(default)s)")
    add("--minutes", type=float, help="end after so many, at the next step or measurement (default: when all is done)")
    add("--table", action="store_true", help="only make the table and the plot of the finished runs")
    args = parser.parse_args()
    if unknown := [way for way in args.ways.split(",") if way not in WAYS]:
        parser.error(f"--ways has {unknown[0]!r}: there are {', '.join(WAYS)}")
    if args.numbers < 2:
        parser.error(f"--numbers must be at least 2, got {args.numbers}")
    args.train_length = args.train_length or args.length
    if min(args.length, args.train_length) <= args.cache_length:
        parser.error("--length and --train_length must be more than --cache_length: nothing is evicted otherwise")
    return args


def all_runs(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Way, cache and seed of all that is measured. Untrained, seeds are the same."""
    caches, ways = args.caches.split(","), args.ways.split(",")
    seeds = list(map(int, args.seeds.split(",")))
    if "before" in ways:
        yield from (("before", cache, 0) for cache in ("dense", *caches))
    for seed in seeds:
        if "plain" in ways:
            yield from (("plain", cache, seed) for cache in ("dense", *caches))
        for cache in caches:
            yield from ((way, cache, seed) for way in ("cached", "distilled") if way in ways)


def read_runs(path: Path) -> list[dict]:
    """The finished runs of a file; a line that was cut off is none."""
    runs = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            runs.append(json.loads(line))
        except ValueError:
            continue
    return runs


def append(path: Path, run: dict) -> None:
    """Add a line to a file, at once: other processes may do the same."""
    with open(path, "ab") as file:
        file.write(f"{json.dumps(run)}\n".encode())


def replace(path: Path, text: str) -> None:
    """Write a file whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def measure(args: argparse.Namespace, way: str, cache: str, seed: int, deadline: float) -> dict:
    """Train in a way, or take what was trained, and measure with the cache."""
    import torch

    from litgpt import LLM
    from litgpt.kvcache import CacheSpec
    from litgpt.lora import Config, add_lora, mark_only_lora_as_trainable
    from litgpt.train.cached_layers import CachedLayers

    torch.manual_seed(seed)
    llm = LLM.load(args.checkpoint, precision=args.precision)
    texts = Texts(llm, args)
    model = llm.prepare_for_training()
    spec = CacheSpec.parse(cache, None if cache == "dense" else args.cache_length)
    if args.tail is not None and "tail" in spec.policy_class.arguments():
        spec = CacheSpec.parse(spec, tail=args.tail)
    layers, result = CachedLayers(model, spec, args.chunk), {}
    if way != "before":
        add_lora(model, Config.extending(model.config, **LORA))
        mark_only_lora_as_trainable(model)
        path = args.out / f"trained-{'-'.join([way, *[cache] * (way != 'plain'), str(seed)])}.pt"
        through = None if way == "plain" else layers
        result["losses"] = train(args, path, model, texts, seed, through, way == "distilled", deadline)
    model.eval()
    return result | {"figures": texts.measure(model, layers, deadline)}


def train(args, path: Path, model, texts: "Texts", seed: int, layers, distil: bool, deadline: float) -> list[float]:
    """LoRA on the batches of a seed, one a step, from where `path` is to the end. Returns the losses of all steps."""
    import torch

    from litgpt.train.model import TrainingModel
    from litgpt.train.teacher import Teacher

    training = TrainingModel(model.train(), layers is None, layers, Teacher(model, args.chunk) if distil else None)
    trained = [p for p in model.parameters() if p.requires_grad]
    exact = [p.detach().float().clone() for p in trained]
    optimizer, losses = torch.optim.AdamW(exact, args.learning_rate, weight_decay=0.0), []
    if path.exists():
        state = torch.load(path, weights_only=True)
        losses = state["losses"]
        for own, saved in zip(exact, state["trained"], strict=True):
            own.copy_(saved)
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])

    def take() -> None:
        with torch.no_grad():
            for p, own in zip(trained, exact, strict=True):
                p.copy_(own)

    def save(**more) -> None:
        temporary = path.with_suffix(".tmp")
        torch.save({"losses": losses, "trained": exact, **more}, temporary)
        os.replace(temporary, path)

    take()
    saved = time.monotonic()
    for step in range(len(losses), args.steps):
        if args.keep_loss and not distil:
            weight = args.keep_loss * (1 - step / args.steps if args.falling else 1)
            loss = loss_of_question_text(model, layers, *texts.batch(seed, 2 * step + 1), weight)
        else:
            ids, labels = texts.batch(seed, step)
            loss = training(ids, labels) / (labels >= 0).sum()
        loss.backward()
        for p, own in zip(trained, exact, strict=True):
            own.grad, p.grad = p.grad.float(), None
        torch.nn.utils.clip_grad_norm_(exact, 1.0)
        factor = min((step + 1) / WARMUP, (args.steps - step) / (args.steps - WARMUP + 1))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * factor
        optimizer.step()
        take()
        losses.append(loss.item())
        late = time.monotonic() > deadline
        if step + 1 == args.steps:
            save()
        elif late or time.monotonic() - saved > SAVE_SECONDS:
            save(optimizer=optimizer.state_dict())
            saved = time.monotonic()
        if late:
            raise OutOfTime
    return losses


def loss_of_question_text(model, layers, ids, labels, weight):
    """The mean loss of answers and that of the text before the first one, without which a model forgets how such texts go on; through a
    cache also that of what is kept, with a weight, of which answers alone say what they need."""
    from torch.nn.functional import cross_entropy

    from litgpt.train.keep_loss import KeepLoss

    answers = labels[0] >= 0
    keeping = KeepLoss(answers, model)
    if layers is None:
        outputs = model(ids, skip_lm_head=True)[0]
    else:
        outputs = model.transformer.ln_f(layers.last_outputs(ids, None, keeping))[0]
    before = slice(0, int(answers.nonzero()[0]))
    loss = cross_entropy(model.logits(outputs[answers]).float(), labels[0, answers])
    loss = loss + cross_entropy(model.logits(outputs[before]).float(), ids[0, before.start + 1 : before.stop + 1])
    return loss + weight * sum(keeping.terms)


class Texts:
    """Prose and questions about prose, to learn and to measure: the same ones for a seed, a step and settings."""

    def __init__(self, llm, args: argparse.Namespace) -> None:
        from litgpt.prompt_frame import PromptFrame
        from litgpt.tasks.document import lines_of, read_document

        self.args, lines = args, lines_of(read_document(args.text))
        cut = round(len(lines) * (1 - HELD_OUT))
        self.learned, self.measured = lines[:cut], lines[cut:]
        self.tokens = llm.tokenizer.encode("".join(self.learned)).long()
        self.frame = PromptFrame(llm.tokenizer, llm.prompt_style)

    def batch(self, seed: int, step: int) -> tuple:
        """Tokens and labels of a step's text: prose, or prose with questions and their answers, which alone are learned."""
        length = self.args.train_length
        if step % 2:
            numbers = Random(f"numbers {seed} {step}").randint(2, self.args.numbers)
            return encoded(self._prompt(self.learned, f"{seed} {step}", length, numbers))[:2]
        start = Random(f"prose {seed} {step}").randrange(len(self.tokens) - length)
        return self.tokens[None, start : start + length], self.tokens[None, start + 1 : start + length + 1]

    def _prompt(self, lines: list[str], seed: str, length: int, numbers: int = 2):
        from litgpt.tasks.retrieval import DEPTHS, retrieval
        from litgpt.tasks.sample import longest_prompt

        make = lambda n: retrieval((random := Random(seed)), n, lines, random.choice(DEPTHS), numbers)  # noqa: E731
        return longest_prompt(make, self.frame, length, "retrieval")

    def measure(self, model, layers, deadline: float) -> dict[str, float]:
        """Of prose with two numbers and questions about them, the mean loss of the prose that comes when a cache is full; of the
        answers, the mean log-probability of their tokens and the share of those that a greedy answer gets right."""
        import torch

        losses, logprobs, right = [], [], []
        with torch.no_grad():
            for i in range(self.args.samples):
                if time.monotonic() > deadline:
                    raise OutOfTime
                prompt = self._prompt(self.measured, f"held out {i}", self.args.length)
                ids, labels, answers = encoded(prompt)
                outputs, ends = layers(ids)[0], range(self.args.cache_length, len(prompt.context) - 1)
                prose = model.logits(outputs[ends.start : ends.stop]).float()
                wanted = ids[0, ends.start + 1 : ends.stop + 1]
                losses.append(torch.nn.functional.cross_entropy(prose, wanted).item())
                for answer in answers:
                    found = model.logits(outputs[answer.start : answer.stop]).float().log_softmax(-1)
                    wanted = labels[0, answer.start : answer.stop]
                    logprobs.append(found.gather(1, wanted[:, None]).mean().item())
                    right.append(float((found.argmax(-1) == wanted).all()))
        return {"loss": mean(losses), "logprob": mean(logprobs), "score": mean(right)}


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


if __name__ == "__main__":
    main()
