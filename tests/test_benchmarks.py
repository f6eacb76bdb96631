"""The benchmarks' arithmetic on made-up samples, and our own workers on a tiny model."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import VOCABULARY, tiny_gpt, tiny_tokenizer

from litgpt.checkpoint.export import save_huggingface
from litgpt.checkpoint.load import load_model, save_litgpt
from litgpt.checkpoint.open import open_checkpoint
from litgpt.engine.loading import choose_kv_caches
from litgpt.generate.base import generate
from litgpt.kvcache import CacheSpec

BENCHMARKS = Path(__file__).parents[1] / "extensions" / "benchmarks"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the benchmarks, which import each other as scripts of one folder do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "workers"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LitGPT folder with a tiny bfloat16 model, and the tokens of a text next to it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_tokenizer().save(folder / "tokenizer")
    model = tiny_gpt(**VOCABULARY).to(torch.bfloat16)
    save_litgpt(model, folder / "litgpt", tokenizer_dir=folder / "tokenizer")
    (folder / "tokens.json").write_text(json.dumps([7, 50, 91, 12, 200]))
    return folder


def test_a_ratio_is_the_median_of_the_rounds_ratios_not_of_the_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    results = module("results", monkeypatch)
    # the machine was ten times slower in the last round, for both; medians 40 and 10 would give 4
    assert results.ratio([40.0, 60.0, 5.0], [10.0, 30.0, 1.0]) == 4.0
    assert results.ratio([40.0, 60.0, 6.0], [20.0, 10.0, 2.0]) == 3.0
    assert results.ratio([3.0, 5.0], [1.0]) == 3.0  # the peer failed in the second round


def test_tables_have_medians_and_ratios_and_leave_out_what_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    results = module("results", monkeypatch)
    decode = {
        results.OURS: [90.0, 99.5, 1975.0],
        results.LITGPT: [45.0, 39.8, 1000.0],
        results.LLAMA_BF16: [100.0, 199.0, 1975.0],
        results.INT8: [150.0, 180.0, 160.0],
        results.LLAMA_Q8_0: [100.0, 90.0, 80.0],
    }
    samples = {
        results.at(results.DECODE, 2048): decode,
        results.at(results.PREFILL, 2048): {name: [1000.0, 1000.0, 2000.0] for name in decode},
        results.at(results.MEMORY, 2048): {name: [float(500 + 500 * i)] * 3 for i, name in enumerate(decode)},
        results.at(results.ABOVE_IMPORTS, 2048): {name: [7.0] * 3 for name in decode},
        results.ANSWER: {results.OURS: [2.0], results.LITGPT: [8.0]},
    }
    header, rule, bf16, int8 = results.comparison(samples, (128, 2048)).splitlines()
    assert [header.count("|"), rule.count("|"), bf16.count("|"), int8.count("|")] == [11] * 4
    assert bf16 == "| this, at 2,048 | 99.5 | 2.00x | 0.90x | 1,000 | 1.00x | 1.00x | 500 | 0.50x | 0.33x |"
    assert int8 == "| this, `--quantize int8`, at 2,048 | 160 |  | 2.00x | 1,000 |  | 1.00x | 2,000 |  | 0.80x |"
    header, rule, *rows, _, seconds = results.medians(samples, (128, 2048)).splitlines()
    assert {header.count("|"), rule.count("|")} == {line.count("|") for line in rows} == {6}
    assert rows[1] == f"| {results.LITGPT}, at 2,048 | 45.0 | 1,000 | 1,000 | 7.00 |"
    assert [line.split(", at")[0] for line in rows] == [
        f"| {name}" for name in (results.OURS, results.LITGPT, results.LLAMA_BF16, results.INT8, results.LLAMA_Q8_0)
    ]
    assert seconds == f"{results.ANSWER}: this 2.00, {results.LITGPT} 8.00"
    assert results.ratios(samples)[results.ANSWER] == {f"{results.OURS} / {results.LITGPT}": 0.25}
    assert "llama" not in results.medians({results.at(results.DECODE, 8): {}}, (8,))


def test_systems_are_those_that_the_tables_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    systems, results, environments = (module(name, monkeypatch) for name in ("systems", "results", "environments"))
    names = [system.name for system in systems.SYSTEMS]
    ours = [system.name for system in systems.SYSTEMS if system.group == "ours"]
    assert sorted(ours) == sorted(results.COMPARED)
    assert {*ours, *(peer for peers in results.COMPARED.values() for peer in peers.values())} == set(names)
    assert len(set(names)) == len({system.key for system in systems.SYSTEMS}) == len(names)
    assert {system.group for system in systems.SYSTEMS} == {"ours", *environments.PEERS}
    assert all((environments.WORKERS / system.worker).is_file() for system in systems.SYSTEMS)


def test_a_part_of_the_systems_is_chosen_by_group_or_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    systems = module("systems", monkeypatch)

    def keys(*words: str) -> list[str]:
        return [system.key for system in systems.choose(words)]

    assert keys("litgpt", "ours-bf16") == ["ours-bf16", "litgpt"]
    assert sorted(keys("llama")) == ["llama-bf16", "llama-q4_1", "llama-q8_0"]
    assert keys("ours", "litgpt", "llama", "transformers") == [system.key for system in systems.SYSTEMS]
    with pytest.raises(ValueError, match="no system 'our', only ours, ours-bf16, litgpt, llama,"):
        systems.choose(["llama", "our"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--systems", "ours,gpt"], "--systems: there is no system 'gpt', only ours"),
        (["--contexts", "128,0"], "--contexts: a context has at least 1 token, got 0"),
        (["--contexts", "128,"], "--contexts: invalid contexts value: '128,'"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    compare = module("compare", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        compare.main()
    assert message in capsys.readouterr().err


def test_numbers_keep_three_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    number = module("results", monkeypatch).number
    assert [number(x) for x in (1974.6, 100.4, 48.34, 2.509)] == ["1,975", "100", "48.3", "2.51"]


def test_common_beginning_of_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    common = module("results", monkeypatch).common_beginning
    assert [common([1, 2, 3], [1, 2, 4]), common([1, 2], [1, 2]), common([1, 2], [1]), common([5], [6])] == [2, 2, 1, 0]


def test_systems_take_turns_and_go_backwards_every_other_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rounds, environments = module("rounds", monkeypatch), module("environments", monkeypatch)
    systems, results = module("systems", monkeypatch), module("results", monkeypatch)
    asked = []

    class Scripted(environments.Launcher):
        """Answers instead of running workers."""

        def work(self, python: Path, worker: str, job: dict) -> dict:
            asked.append((str(python), job))
            speed = float(len(asked))
            answer = [1, 2, 3] if worker == "a.py" else [1, 2, 4]
            return {
                "prefill": 10 * speed,
                "decode": speed,
                "peak_bytes": 5e6,
                "peak_above_import": 1e6,
                "threads": self.threads,
                "answer": answer,
                "note": "well",
            }

    options = {"quantize": "int8"}
    measured = [
        systems.System("ours-bf16", systems.OURS, "a.py", "folder", options, long=True),
        systems.System("litgpt", systems.LITGPT, "b.py", "file"),
    ]
    places = rounds.Places(
        {"ours": Path("ours"), "litgpt": Path("peer")}, {"folder": Path("x"), "file": Path("y")}, Path("text")
    )
    samples, notes = rounds.measure(Scripted(tmp_path, 2), measured, places, 2, rounds.Sizes((16, 64), 2, 64, 1))
    common = {"tokens": "text", "threads": 2}
    a, b = ("ours", {"checkpoint": "x", **options, **common}), ("peer", {"checkpoint": "y", **common})
    short, long = {"context": 16, "new_tokens": 2}, {"context": 64, "new_tokens": 1}
    turns = [(a, short), (b, short), (a, long), (b, short), (a, short), (a, long)]
    assert asked == [(python, job | sizes) for (python, job), sizes in turns]
    assert samples[results.at(results.DECODE, 16)] == {systems.OURS: [1.0, 5.0], systems.LITGPT: [2.0, 4.0]}
    assert samples[results.at(results.PREFILL, 64)] == {systems.OURS: [30.0, 60.0]}
    assert samples[results.at(results.MEMORY, 16)][systems.OURS] == [5.0, 5.0]
    assert notes == [
        f"{systems.OURS}; {systems.LITGPT}: well",
        f"greedy tokens in common with this, of 3 at 16: {systems.LITGPT} 2",
    ]


def test_a_system_that_fails_later_leaves_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rounds, environments = module("rounds", monkeypatch), module("environments", monkeypatch)
    systems, results = module("systems", monkeypatch), module("results", monkeypatch)
    calls = []

    class Failing(environments.Launcher):
        def work(self, python: Path, worker: str, job: dict) -> dict:
            calls.append(worker)
            if worker == "b.py" and calls.count(worker) == 2:
                raise RuntimeError("no more memory")
            return dict.fromkeys(("prefill", "decode", "peak_bytes", "peak_above_import"), 2.0) | {
                "threads": self.threads,
                "answer": [1],
            }

    measured = [
        systems.System("ours-bf16", systems.OURS, "a.py", "x", {}),
        systems.System("litgpt", systems.LITGPT, "b.py", "x"),
    ]
    places = rounds.Places({"ours": Path("o"), "litgpt": Path("p")}, {"x": Path("x")}, Path("text"))
    kept = []
    samples, notes = rounds.measure(
        Failing(tmp_path, 2), measured, places, 3, rounds.Sizes((16,), 2, 64, 1), lambda *found: kept.append(str(found))
    )
    assert len(kept) == 4  # after every run, all that there is
    assert kept[-1] == str((samples, notes))
    decode = samples[results.at(results.DECODE, 16)]
    assert {name: len(values) for name, values in decode.items()} == {systems.OURS: 3, systems.LITGPT: 1}
    assert results.comparison(samples, (16,))
    assert notes[-1] == f"{systems.LITGPT} failed in round 2, 16 tokens: no more memory"


def test_a_command_that_does_not_answer_leaves_the_speeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rounds, environments = module("rounds", monkeypatch), module("environments", monkeypatch)
    systems, results = module("systems", monkeypatch), module("results", monkeypatch)
    found = dict.fromkeys(("prefill", "decode", "peak_bytes", "peak_above_import"), 2.0)

    class Scripted(environments.Launcher):
        def work(self, python: Path, worker: str, job: dict) -> dict:
            return found | {"threads": self.threads, "answer": [1]}

    measured = [systems.System("ours-bf16", systems.OURS, "a.py", "x", {}, command=True)]
    places = rounds.Places({"ours": Path("no interpreter")}, {"x": Path("x")}, Path("text"))
    samples, notes = rounds.measure(Scripted(tmp_path, 2), measured, places, 3, rounds.Sizes((16,), 2, 64, 1))
    assert samples[results.at(results.DECODE, 16)] == {systems.OURS: [2.0] * 3}
    assert len(notes) == 1
    assert notes[0].startswith(f"{systems.OURS} failed in round 1, command: ")


def test_a_restriction_reaches_every_process_and_is_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rounds, environments, systems = (module(name, monkeypatch) for name in ("rounds", "environments", "systems"))
    free, restricted = environments.Launcher(tmp_path, 1), environments.Launcher(tmp_path, 1, "avx2")
    for own in (True, False):
        assert "ONEDNN_MAX_CPU_ISA" not in free.environment(own)
        env = restricted.environment(own)
        assert [env["LITGPT_KERNELS"], env["ATEN_CPU_CAPABILITY"], env["ONEDNN_MAX_CPU_ISA"]] == [
            "avx2",
            "avx2",
            "AVX2",
        ]
    commands = []

    def run(command: list[str], **options) -> None:
        commands.append(options)
        if "venv" in command:
            Path(command[-1]).mkdir()

    monkeypatch.setattr(environments.subprocess, "run", run)
    monkeypatch.setattr(environments, "check_python", lambda python, peer, torch_version: python)
    places = [environments.ensure_environment(tmp_path, peer, "2.0.0", "avx2") for peer in ("litgpt", "llama")]
    assert [place.parents[1].name.endswith("-avx2") for place in places] == [False, True]
    assert ["CMAKE_ARGS" in options.get("env", {}) for options in commands] == [False, False, False, True]

    class Scripted(environments.Launcher):
        def work(self, python: Path, worker: str, job: dict) -> dict:
            return {"threads": 1, "note": "compiled for AVX2, AVX512"}

    measured = [systems.System("llama-bf16", systems.LLAMA_BF16, "a.py", "x", {})]
    where = rounds.Places({"llama": Path("o")}, {"x": Path("x")}, Path("text"))
    sizes = rounds.Sizes((16,), 2, 64, 1)
    samples, notes = rounds.measure(Scripted(tmp_path, 1, "avx2"), measured, where, 1, sizes)
    assert not samples
    assert notes[0].endswith("it does not run restricted to avx2: compiled for AVX2, AVX512")


@pytest.mark.parametrize(
    ("output", "begun"),
    [
        (b"The capital", (True, False)),
        (b"L'\xc3\x89toile", (True, False)),
        (b" \n", (False, False)),
        (b"user What is the capital of France? assistant\n", (True, False)),
        (b"user What is the capital of France? assistant\nL'", (True, True)),
        (b"What is the capital of France? The capital of France", (True, True)),
    ],
)
def test_the_beginning_of_an_answer_is_known_however_it_begins(monkeypatch, output, begun) -> None:
    first_token = module("first_token", monkeypatch)
    patterns = (first_token.ANSWER, first_token.ANSWER_AFTER_PROMPT)
    assert tuple(bool(pattern.search(output)) for pattern in patterns) == begun


@pytest.mark.parametrize("options", [{}, {"quantize": "int4"}])
def test_worker_of_ours_generates_what_the_package_generates(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path, options: dict
) -> None:
    environments = module("environments", monkeypatch)
    job = {"checkpoint": str(tiny_folder / "litgpt"), "tokens": str(tiny_folder / "tokens.json")}
    job |= {"context": 8, "new_tokens": 4, **options}
    found = environments.Launcher(tmp_path, 1).work(Path(sys.executable), "ours.py", job)
    assert found["threads"] == 1
    assert min(found["prefill"], found["decode"]) > 0 <= found["peak_above_import"]
    assert found["peak_bytes"] > found["peak_above_import"]
    ours = module("ours", monkeypatch)
    model = ours.make_ready(tiny_folder / "litgpt", "bf16-true", **options).model
    prompt = torch.tensor([7, 50, 91, 12, 200, 7, 50, 91])
    assert found["answer"] == generate(model, prompt, 13, temperature=0.0, include_prompt=False).tolist()
    assert found["note"] == f"decoded {ours.how_it_decodes(model)}; {ours.instructions()}"
    assert "torch for" in found["note"]


def test_a_failing_worker_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environments = module("environments", monkeypatch)
    job = {"checkpoint": str(tmp_path / "nothing"), "out_dir": str(tmp_path / "out"), "text": str(tmp_path / "text")}
    with pytest.raises(RuntimeError, match=r"(?s)write_layouts.py failed.*nothing' is neither"):
        environments.Launcher(tmp_path, 1).work(Path(sys.executable), "write_layouts.py", job)


def test_an_interpreter_without_the_peer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    environments = module("environments", monkeypatch)
    with pytest.raises(ValueError, match=r"should have litgpt 0\.5\.13 and torch 0\.0\.1, but: .+"):
        environments.check_python(Path(sys.executable), "litgpt", "0.0.1")
    with pytest.raises(ValueError, match=r"should have llama-cpp-python \d\.\d\.\d+, but: .+"):
        environments.check_python(Path(sys.executable), "llama", "0.0.1")


def test_only_the_peers_that_were_chosen_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    compare, environments = module("compare", monkeypatch), module("environments", monkeypatch)
    arguments = ["--systems", "ours-int8", "--llama_python", "nowhere", "--checkpoint", str(tiny_folder / "litgpt")]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    places = compare.prepare(environments.Launcher(tmp_path, 1), compare.parse_arguments())
    assert places.pythons == {"ours": Path(sys.executable)}
    assert places.tokens.is_file()
    assert {name: path.is_dir() for name, path in places.weights.items()} == {"litgpt": True, "huggingface": True}


def test_gguf_files_are_made_once_and_wholly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layouts, environments = module("layouts", monkeypatch), module("environments", monkeypatch)
    source, asked = tmp_path / "model.gguf", []
    source.touch()

    class Scripted(environments.Launcher):
        """Finds the file as it is done in earnest, and writes names instead of weights; the first time it fails."""

        def work(self, python: Path, worker: str, job: dict) -> dict:
            if worker == "find_gguf.py":
                return super().work(python, worker, job)
            asked.append((str(python), worker, job["source"]))
            Path(job["out_dir"], "bf16.gguf").touch()
            if len(asked) == 1:
                raise RuntimeError("no space left")
            return {}

    launcher = Scripted(tmp_path, 1)
    with pytest.raises(RuntimeError, match="no space left"):
        layouts.ensure_ggufs(launcher, source, Path("peer"))
    found = [layouts.ensure_ggufs(launcher, source, Path("peer")) for _ in range(2)]
    assert asked == [("peer", "write_ggufs.py", str(source))] * 2
    assert found[0] == found[1]
    assert sorted(found[0]) == ["bf16", "q8_0", "shipped"]
    assert found[0]["bf16"].is_file()
    with pytest.raises(
        RuntimeError, match=r"(?s)find_gguf.py failed.*needs a \.gguf file, not .*; name one by --checkpoint"
    ):
        layouts.ensure_ggufs(launcher, tmp_path, Path("peer"))


def test_windows_of_a_long_text_cover_it_and_the_caches_keep_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    long_text = module("long_text", monkeypatch)
    model = tiny_gpt().to(torch.bfloat16)
    choose_kv_caches(model, CacheSpec("lastrec", cache_length=8))
    tokens = torch.randint(100, (61,))
    found = long_text.measure_windows(model, tokens, prompt=8, start=13, windows=4)
    assert found["edges"] == [13, 25, 37, 49, 61]
    assert len(found["speeds"]) == 4
    assert min(found["speeds"]) > 0
    assert model.next_token_pos == 61
    layers, keys_and_values, groups, slots, head_size, bytes_each = 2, 2, 2, 8, 16, 2
    expected = layers * keys_and_values * groups * slots * head_size * bytes_each
    assert found["allocated"] == found["estimated"] == [expected] * 5
    assert found["apriori"] == expected


def test_caches_that_grow_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lastrec, environments, layouts = (module(name, monkeypatch) for name in ("lastrec", "environments", "layouts"))
    found = {"edges": [4, 8], "speeds": [2.0], "allocated": [64, 64], "estimated": [64, 64], "apriori": 64}

    class Scripted(environments.Launcher):
        """Answers instead of running workers."""

        def work(self, python: Path, worker: str, job: dict) -> dict:
            return found

    where, sizes = layouts.Layouts(tmp_path, tmp_path, tmp_path), lastrec.Sizes(8, 4, 1, 4)
    result = lastrec.measure(Scripted(tmp_path, 1), where, 3, sizes)
    assert result == {"slots": 4, "edges": [4, 8], "speeds": [[2.0]] * 3, "cache_bytes": 64}
    assert lastrec.markdown(result).splitlines()[2] == "| 4 to 8 | 2.00 |"
    found["allocated"] = [64, 128]
    with pytest.raises(RuntimeError, match=r"allocated \[64, 128\], size_estimate\(\) \[64\]"):
        lastrec.measure(Scripted(tmp_path, 1), where, 3, sizes)


@pytest.fixture
def tiny_source(tmp_path: Path) -> Path:
    """A Hugging Face folder with the weights of a tiny model in several files."""
    save_huggingface(tiny_gpt(**VOCABULARY).to(torch.bfloat16), tmp_path / "source", shard_bytes=50_000)
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    return tmp_path / "source"


def test_conversions_take_turns_in_folders_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_source: Path
) -> None:
    convert, environments = module("convert", monkeypatch), module("environments", monkeypatch)
    asked = []

    class Scripted(environments.Launcher):
        """Answers instead of running workers."""

        def work(self, python: Path, worker: str, job: dict) -> dict:
            if worker == "compare_weights.py":
                asked.append([Path(file).parents[1].name for file in job["files"]])
                return {}
            assert sorted(file.name for file in (Path(job["folder"]) / "model").iterdir()) == names
            asked.append((python.name, job["command"]))
            return {"s": float(len(asked))}

    names = sorted(file.name for file in tiny_source.iterdir())
    pythons = {convert.OURS: Path("a"), convert.LITGPT: Path("b")}
    samples = convert.measure(Scripted(tmp_path, 1), pythons, tiny_source, "tiny", 2)
    once = [(python, command) for python in "ab" for command in convert.COMMANDS]
    assert asked == [*once, ["0", "1"], *once[2:], *once[:2]]
    assert samples["convert_to_litgpt, s"] == {convert.OURS: [1.0, 8.0], convert.LITGPT: [3.0, 6.0]}
    assert convert.markdown(samples).splitlines()[2] == "| convert_to_litgpt, s | 4.50 | 4.50 | 0.83x |"
    assert not (tmp_path / "converted").exists()


def test_worker_of_conversions_converts_and_differences_are_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_source: Path
) -> None:
    convert, environments = module("convert", monkeypatch), module("environments", monkeypatch)
    launcher, own = environments.Launcher(tmp_path, 1), Path(sys.executable)
    convert.link_files(tiny_source, tmp_path / "run" / "model")
    for command in convert.COMMANDS:
        job = {"command": command, "model": None, "folder": str(tmp_path / "run")}
        found = launcher.work(own, "convert_weights.py", job)
        assert min(found["s"], found["CPU s"]) > 0
        assert found["peak memory, MB"] > found["peak memory above imports, MB"] >= 0
    assert (tmp_path / "run" / "back" / "model.safetensors").is_file()
    weights = tmp_path / "run" / "model" / "lit_model.pth"
    other = tmp_path / "other.pth"
    other.write_bytes(weights.read_bytes())
    launcher.work(own, "compare_weights.py", {"files": [str(weights), str(other)]})
    changed = torch.load(other, weights_only=True)
    changed["transformer.ln_f.weight"][3] += 1
    torch.save(changed, other)
    with pytest.raises(RuntimeError, match=r"differ in transformer\.ln_f\.weight"):
        launcher.work(own, "compare_weights.py", {"files": [str(weights), str(other)]})


def test_worker_of_sessions_prefills_saves_and_restores(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    environments = module("environments", monkeypatch)
    launcher = environments.Launcher(tmp_path, 1)
    job = {"checkpoint": str(tiny_folder / "litgpt"), "tokens": str(tiny_folder / "tokens.json")}
    job |= {"session": str(tmp_path / "s"), "document": 70, "question": 3, "kv_cache": "dense", "cache_length": None}
    fresh, saved, restored = (
        launcher.work(Path(sys.executable), "long_document.py", job | {"kind": kind})
        for kind in ("fresh", "save", "restore")
    )
    assert [found["reused"] for found in (fresh, saved, restored)] == [0, 69, 69]
    assert [restored[key] for key in ("tokens", "logits")] == [saved[key] for key in ("tokens", "logits")]
    assert len(restored["tokens"]) == 8
    assert 0 < restored["load"] < restored["first"]
    assert saved["save"] > 0


def test_sessions_are_compared_round_by_round_and_must_say_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sessions, environments, layouts = (module(name, monkeypatch) for name in ("sessions", "environments", "layouts"))
    asked, answers = [], {"save": [1, 2], "restore": [1, 2], "fresh": [1, 3]}
    logits = dict.fromkeys(answers, "equal")

    class Scripted(environments.Launcher):
        """Answers instead of running workers."""

        def work(self, python: Path, worker: str, job: dict) -> dict:
            kind = job["kind"]
            asked.append(kind)
            Path(job["session"]).write_bytes(b"x" * 2_000_000)
            seconds = len(asked) * (10.0 if kind == "fresh" else 1.0)
            found = {"first": seconds, "load": seconds / 2, "save": 0.25, "tokens": answers[kind]}
            return found | {"logits": logits[kind], "cache_bytes": 1_900_000}

    where = layouts.Layouts(tmp_path, tmp_path, tmp_path)
    args = argparse.Namespace(rounds=2, document=500, kv_cache="dense", cache_length=None)
    result = sessions.measure(Scripted(tmp_path, 1), where, args)
    assert asked == ["save", "fresh", "restore", "restore", "fresh"]
    assert result["samples"] == {"fresh": [20.0, 50.0], "restore": [3.0, 4.0], "load": [1.5, 2.0]}
    table = sessions.markdown(result)
    assert "| prefilled | 35.0 |\n| restored from a file | 3.500 |" in table
    assert (
        "9.6x sooner. The file has 2.00 MB, the caches 1.90 MB; reading it took 1.750 s of that, writing it 0.25 s."
        in table
    )
    assert not (tmp_path / "document.session").exists()
    for changed in (answers, logits):
        before, changed["restore"] = changed["restore"], [1, 4]
        with pytest.raises(
            RuntimeError, match=r"restored: \[1, \d\], but the saved session: \[1, 2\], or other logits"
        ):
            sessions.measure(Scripted(tmp_path, 1), where, args)
        changed["restore"] = before


def test_worker_of_batches_answers_each_prompt_as_alone(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    environments, batches = (module(name, monkeypatch) for name in ("environments", "batches"))
    lengths = batches.prompt_lengths(2, 30, 4)
    assert lengths == [2, 11, 21, 30]
    job = {"checkpoint": str(tiny_folder / "litgpt"), "tokens": str(tiny_folder / "tokens.json"), "lengths": lengths}
    job |= {"new_tokens": 5, "precision": "32-true", "kinds": batches.KINDS}
    found = environments.Launcher(tmp_path, 1).work(Path(sys.executable), "ragged_batch.py", job)
    assert found["together"]["tokens"] == found["alone"]["tokens"]
    assert [len(row) for row in found["alone"]["tokens"]] == [5] * 4
    assert min(found[kind][part] for kind in batches.KINDS for part in ("prefill", "decode")) > 0


def test_batches_are_compared_round_by_round_and_must_equal_their_own_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    batches, environments, layouts = (module(name, monkeypatch) for name in ("batches", "environments", "layouts"))
    asked, tokens = [], {"together": [[1], [2]], "alone": [[1], [2]]}

    class Scripted(environments.Launcher):
        """Answers instead of running workers."""

        def work(self, python: Path, worker: str, job: dict) -> dict:
            asked.append((job["precision"], *job["kinds"]))
            speed = {"together": 1.0, "alone": 4.0 * len(asked)}
            return {
                kind: {"prefill": speed[kind], "decode": 2 * speed[kind], "tokens": tokens[kind]}
                for kind in job["kinds"]
            }

    where = layouts.Layouts(tmp_path, tmp_path, tmp_path)
    result = batches.measure(Scripted(tmp_path, 1), where, 2, [10, 50], 6)
    assert asked == [
        ("32-true", "together", "alone"),
        ("bf16-true", "together", "alone"),
        ("bf16-true", "alone", "together"),
    ]
    table = batches.markdown(result)
    assert "| prefill, prompt tokens/s | 60.0 | 6.00 | 10.00x |" in table
    assert "| decode, new tokens/s | 5.00 | 0.50 | 10.00x |" in table
    assert "| all, new tokens/s | 4.00 | 0.40 | 10.00x |" in table
    tokens["together"] = [[1], [3]]
    with pytest.raises(RuntimeError, match=r"prompts of \[50\] tokens"):
        batches.measure(Scripted(tmp_path, 1), where, 1, [10, 50], 6)


def test_warm_up_is_that_of_a_process_that_finds_nothing_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environments, warmup = (module(name, monkeypatch) for name in ("environments", "warmup"))
    runs = []

    def run(command: list[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess:
        folder = Path(env["XDG_CACHE_HOME"])
        runs.append(("--compile" in command, env.get("LITGPT_KERNELS"), folder, sorted(folder.iterdir())))
        (folder / f"made {len(runs)}").touch()
        return subprocess.CompletedProcess(command, int("fails" in str(command)), "", "no such model")

    monkeypatch.setattr(warmup.subprocess, "run", run)
    launcher = environments.Launcher(tmp_path, 1)
    result = {kind: warmup.measure(launcher, Path("model"), kind, 2, 4) for kind in warmup.KINDS}
    assert [(compiles, kernels) for compiles, kernels, *_ in runs[::2]] == [(False, None), (False, "0"), (True, "0")]
    for first, later in zip(runs[::2], runs[1::2], strict=True):
        assert first[2] == later[2]
        assert (len(first[3]), len(later[3])) == (0, 1)
        assert not first[2].exists()
    assert all(len(seconds) == 2 for seconds in result.values())
    table = warmup.markdown({"kernels": [20.04, 5.0, 4.96]}, 4)
    assert table.splitlines()[-1] == "| kernels | 20.0 | 5.0 |"
    with pytest.raises(RuntimeError, match="no such model"):
        warmup.measure(launcher, Path("fails"), "kernels", 2, 4)


def test_perplexity_is_that_of_a_texts_tokens_and_compared_token_by_token(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    perplexity = module("perplexity", monkeypatch)
    windows = torch.randint(0, 261, (2, 16))
    checkpoint = open_checkpoint(tiny_folder / "litgpt")
    results = perplexity.measure(checkpoint, windows, ["int8", "int4"])
    probabilities = load_model(checkpoint)(windows).float().softmax(-1)
    chosen = probabilities[:, :-1].gather(-1, windows[:, 1:, None]).log()
    assert results["bf16"].loss == pytest.approx(-chosen.mean().item(), rel=0.02)
    assert (results["bf16"].divergence, results["bf16"].agreement) == (pytest.approx(0, abs=1e-6), 1)
    assert 0 < results["int8"].divergence < results["int4"].divergence
    assert results["bf16"].bytes > results["int8"].bytes > results["int4"].bytes
    assert perplexity.table(results).count("|") == 5 * 6
    results = perplexity.measure_caches(checkpoint, windows, ["dense-int8", "dense-int4"])
    assert results["dense"].loss == pytest.approx(-chosen.mean().item(), rel=0.02)
    assert 0 < results["dense-int8"].divergence < results["dense-int4"].divergence
    assert results["dense"].bytes > results["dense-int8"].bytes


def test_speculation_is_measured_and_compared_token_by_token(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speculation = module("speculation", monkeypatch)
    monkeypatch.setattr(speculation, "tasks", lambda text, words: {"repeat": "abab", "tell": "x"})
    results = speculation.measure(tiny_folder / "litgpt", "", 2, 10, 12, 3)
    assert set(results) == {"repeat", "tell"}
    for found in results.values():
        assert [len(found["speeds"][kind]) for kind in ("plain", "lookup")] == [2, 2]
        assert found["same, 32-true"] == found["new, 32-true"] > 0
        assert 0 <= found["accepted"] <= found["drafted"]
    found["speeds"] = {"plain": [10.0, 20.0, 90.0], "lookup": [40.0, 30.0, 180.0]}
    found |= {"same, bf16-true": 5, "new, bf16-true": 12, "drafted": 9, "accepted": 4}
    last = speculation.markdown(results).splitlines()[-1]
    assert "| 20.0 | 40.0 | 2.00x | 4 of 9 | 5 of 12 |" in last


def test_the_shares_of_a_training_step_are_named_by_kind_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS / "workers")
    from step_shares import shares_of

    from litgpt.train.model import TrainingModel

    model = TrainingModel(tiny_gpt().requires_grad_(True))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, 100, (2, 20))

    def step() -> None:
        model(ids, ids).backward()
        optimizer.step()

    shares = shares_of(step)
    assert set(shares) == {"products", "attention", "optimizer", "head and loss", "rest"}
    assert sum(shares.values()) == pytest.approx(1)


def test_finished_adaptations_are_not_repeated_and_stopped_training_goes_on_as_if_it_had_not_been(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapting = module("adapting_to_caches", monkeypatch)
    prose = "".join(f"Line {i} says that {i * i % 97} are left.\n" for i in range(200))
    (tmp_path / "prose.txt").write_text(prose)

    def run(folder: str, *more: str) -> list[dict]:
        numbers = (
            "--length 500 --train_length 480 --cache_length 16 --chunk 128 --steps 3 --samples 1 --precision 32-true"
        )
        command = f"x {tiny_folder / 'litgpt'} --out {tmp_path / folder} --text {tmp_path / 'prose.txt'} {numbers}"
        monkeypatch.setattr(sys, "argv", [*command.split(), "--caches", "lastrec", "--seeds", "1", *more])
        adapting.main()
        return adapting.read_runs(tmp_path / folder / "runs.jsonl")

    whole = run("whole", "--ways", "before,cached")
    assert [(x["way"], x["cache"]) for x in whole] == [
        ("before", "dense"),
        ("before", "lastrec"),
        ("cached", "lastrec"),
    ]
    kept = run(
        "kept", "--ways", "cached", "--caches", "snapkv", "--keep_loss", "5", "--numbers", "4", "--train_length", "900"
    )
    assert kept[0]["cache"] == "snapkv"
    assert len(kept[0]["losses"]) == 3
    for i in range(3):  # each stops after a step
        assert run("pieces", "--ways", "cached", "--minutes", "0") == []
        state = torch.load(tmp_path / "pieces" / "trained-cached-lastrec-1.pt", weights_only=True)
        assert len(state["losses"]) == i + 1
    pieces = run("pieces", "--ways", "cached")
    assert pieces[0]["losses"] == whole[2]["losses"]
    assert pieces[0]["figures"] == whole[2]["figures"]
    (tmp_path / "pieces" / "runs.jsonl").open("a").write('{"way": "cut o')
    monkeypatch.setattr(adapting, "measure", lambda *_: pytest.fail("it was measured already"))
    assert run("pieces", "--ways", "cached") == pieces
    with pytest.raises(SystemExit, match=r"other settings \(steps\)"):
        run("pieces", "--steps", "4")


def test_what_is_won_back_is_a_share_of_what_the_cache_costs_with_an_interval_over_seeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = module("adapting_table", monkeypatch)

    def run(way: str, cache: str, seed: int, logprob: float) -> dict:
        return {"way": way, "cache": cache, "seed": seed, "figures": {"loss": 1.0, "logprob": logprob, "score": 0.5}}

    runs = [run("before", "h2o", 0, -4.0), run("before", "dense", 0, -2.0)]
    for seed, back in enumerate((0.25, 0.5, 0.75)):
        runs += [run("plain", "dense", seed, -1.0), run("plain", "h2o", seed, -3.0)]
        runs += [run("cached", "h2o", seed, -3.0 + 2 * back)]
    text = table.markdown(runs)
    # 95 % of three values: 4.30 standard errors of 0.25 / sqrt(3)
    assert "| h2o: log-probability | -4.00 | -3.00 ± 0.00 | -2.00 ± 1.24 | 100% ± 62% | 50% ± 62% |" in text
    assert "won back after LoRA through the cache, of the cost as it is" in text
    assert "Means of 3 seeds" in text
    assert "| h2o: perplexity | 2.72 | 2.72 ± 0.00 | 2.72 ± 0.00 |  |  |" in text
    assert "self-distillation" not in text
    assert table.plot(runs).count("<rect") == 4 + 2 * 3
    assert "-2.00" in table.plot(runs)


def test_worker_of_policies_decodes_through_caches_in_turn(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    policies, environments = (module(name, monkeypatch) for name in ("policies", "environments"))
    args = argparse.Namespace(
        tokens=60, slots=32, chunk=16, rounds=1, decode=2, base="lastrec", caches="h2o,dense-int8"
    )
    result = policies.measure(environments.Launcher(tmp_path, 1), str(tiny_folder / "litgpt"), args)
    assert list(result["decode"]) == ["lastrec", "h2o", "dense-int8"]
    assert all(len(speeds) == 2 and min(speeds) > 0 for speeds in result["decode"].values())
    result["decode"] = {"lastrec": [10.0, 20.0, 30.0], "h2o": [5.0, 30.0, 30.0]}
    assert "| lastrec | 20.0 | 1.00x |\n| h2o | 30.0 | 1.00x |" in policies.markdown(result)
