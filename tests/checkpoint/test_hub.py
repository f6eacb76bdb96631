"""Downloads, from a small imitation of the hub on this machine."""

import errno
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest
import torch
from tiny_models import save_tiny

from litgpt.checkpoint import hub as our_hub
from litgpt.checkpoint import load_model
from litgpt.checkpoint.hub import checkpoints_home, fetch_checkpoint
from litgpt.config import Config
from litgpt.families import is_tied
from litgpt.model import GPT
from litgpt.scripts.download import download_from_hub, num_parameters

REPO = "someone/tiny"


class Hub:
    """Serves the files of one folder as a repository, notes what is asked for, and can be told to fail."""

    def __init__(self, folder):
        self.folder, self.asked, self.error, self.broken, self.page = folder, [], None, None, None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def answer(self, status, body=b"", **headers):
                self.send_response(status)
                for key, value in ({"Content-Length": len(body)} | headers).items():
                    self.send_header(key.replace("_", "-"), str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                if hub.page:
                    return self.answer(200, hub.page.encode(), Content_Type="text/html")
                if hub.error:
                    status, code = hub.error
                    return self.answer(status, X_Error_Code=code)
                if self.path.startswith("/api/models/"):
                    files = [
                        {"rfilename": str(p.relative_to(hub.folder))} for p in hub.folder.rglob("*") if p.is_file()
                    ]
                    return self.answer(200, json.dumps({"id": REPO, "sha": "0" * 40, "siblings": files}).encode())
                name = self.path.split("/resolve/main/")[1]
                if self.command == "GET":
                    hub.asked.append(name)
                    if name == hub.broken:
                        return self.answer(404, X_Error_Code="EntryNotFound")
                data = (hub.folder / name).read_bytes()
                self.answer(200, data, ETag=f'"{hash(data) & 0xFFFFFFFF:x}"', X_Repo_Commit="0" * 40)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "repo").mkdir()
    hub = Hub(tmp_path / "repo")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setenv("LITGPT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_downloaded_model_gives_the_logits_of_the_original(hub, tmp_path):
    reference = save_tiny("llama", hub.folder, max_shard_size="20KB")
    for name in ("README.md", "onnx.bin", "tokenizer.json", "chat_template.jinja"):
        (hub.folder / name).write_text("{}")
    (hub.folder / "original").mkdir()
    (hub.folder / "original" / "model.safetensors").write_text("another format")
    (hub.folder / "original" / "params.json").write_text("{}")
    folder = fetch_checkpoint(REPO)
    assert folder == tmp_path / "home" / REPO
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert names(folder) == names(hub.folder) - {"README.md", "onnx.bin", "original"}
    assert names(folder.parent) == {"tiny", ".tiny.partial.lock"}
    tokens = torch.randint(70, (1, 8))
    torch.testing.assert_close(load_model(folder)(tokens), reference(tokens).logits, atol=1e-5, rtol=1e-5)


def test_weights_of_other_names_and_formats_are_chosen_in_order(hub, tmp_path):
    for name in ("pytorch_model.bin", "model.safetensors", "tokenizer.model"):
        (hub.folder / name).write_text("x")
    assert "pytorch_model.bin" not in names(fetch_checkpoint(REPO, tmp_path / "a"))
    (hub.folder / "model.safetensors").unlink()
    assert names(fetch_checkpoint(REPO, tmp_path / "b")) == {"pytorch_model.bin", "tokenizer.model"}
    (hub.folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="someone/tiny holds no weights"):
        fetch_checkpoint(REPO, tmp_path / "c")
    assert names(fetch_checkpoint(REPO, tmp_path / "d", tokenizer_only=True)) == {"tokenizer.model"}


def test_an_interrupted_download_leaves_nothing_that_loads_and_is_resumed(hub, tmp_path):
    save_tiny("llama", hub.folder, max_shard_size="20KB")
    last = max(name for name in names(hub.folder) if name.startswith("model-"))
    hub.broken = last
    with pytest.raises(ConnectionError):
        fetch_checkpoint(REPO, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    hub.broken, before = None, len(hub.asked)
    fetch_checkpoint(REPO, tmp_path / "m")
    assert hub.asked[before:] == [last]
    assert names(tmp_path / "m") == names(hub.folder)


def test_weights_join_a_tokenizer_that_is_there(hub, tmp_path):
    save_tiny("llama", hub.folder)
    (hub.folder / "tokenizer.json").write_text("{}")
    fetch_checkpoint(REPO, tmp_path / "m", tokenizer_only=True)
    (tmp_path / "m" / "mine.txt").write_text("kept")
    fetch_checkpoint(REPO, tmp_path / "m")
    assert names(tmp_path / "m") == names(hub.folder) | {"mine.txt"}


def test_an_unknown_architecture_is_refused_before_weights_are_fetched(hub, tmp_path):
    (hub.folder / "config.json").write_text(json.dumps({"model_type": "lama", "architectures": ["LamaForCausalLM"]}))
    (hub.folder / "model.safetensors").write_text("x")
    with pytest.raises(ValueError, match="'lama' is not supported .*llama"):
        fetch_checkpoint(REPO, tmp_path / "m")
    assert hub.asked == ["config.json"]
    fetch_checkpoint(REPO, tmp_path / "m", config=Config.from_name("pythia-14m"))


def test_quantised_weights_are_refused_before_they_are_fetched(hub, tmp_path):
    config = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    (hub.folder / "config.json").write_text(json.dumps(config))
    (hub.folder / "model.safetensors").write_text("x")
    with pytest.raises(ValueError, match="weights quantised with 'fp8' are not supported"):
        fetch_checkpoint(REPO, tmp_path / "model")
    with pytest.raises(ValueError, match="weights quantised with 'fp8' are not supported"):
        fetch_checkpoint(REPO, tmp_path / "model", config=Config.from_name("pythia-14m"))
    assert set(hub.asked) == {"config.json"}


@pytest.mark.parametrize(
    ("status", "code", "error", "message"),
    [
        (403, "GatedRepo", PermissionError, "agree at https://huggingface.co/someone/tiny, then pass --access_token"),
        (404, "RepoNotFound", FileNotFoundError, "has no model 'someone/tiny', or it is private"),
        (403, "Other", PermissionError, "refuses someone/tiny"),
        (500, "Other", ConnectionError, "failed with status 500"),
    ],
)
def test_refusals_of_the_hub_are_one_line(hub, tmp_path, status, code, error, message):
    hub.error = (status, code)
    with pytest.raises(error, match=message) as caught:
        fetch_checkpoint(REPO, tmp_path / "m")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*m*"))


def test_a_proxy_that_answers_in_the_place_of_the_hub_is_told(hub, tmp_path):
    hub.page = "<html><body>Please log in</body></html>"
    with pytest.raises(ConnectionError, match="a proxy, or the login page of a network") as error:
        fetch_checkpoint(REPO, tmp_path / "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "is full: free some space"), (errno.EACCES, "may not be written")]
)
def test_a_disk_that_takes_nothing_is_told_in_plain_words(number, words, hub, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(number, "strange words", "a file")

    (hub.folder / "model.safetensors").write_text("x")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(OSError, match=f"{words}, or set LITGPT_HOME to another folder"):
        fetch_checkpoint(REPO, tmp_path / "m")


def test_no_hub_is_one_line_within_seconds(hub, tmp_path, monkeypatch):
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(
        ConnectionError, match="Could not download someone/tiny: the Hugging Face hub cannot be reached"
    ):
        download_from_hub(REPO)
    monkeypatch.setattr(our_hub, "_ANSWER_SECONDS", 0.2)
    over = threading.Event()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: over.wait(100))
    with pytest.raises(ConnectionError, match="no answer within 0 seconds"):
        fetch_checkpoint(REPO)
    over.set()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        fetch_checkpoint(REPO)


def test_home_is_a_folder_here_unless_the_environment_names_one(monkeypatch, tmp_path):
    monkeypatch.setenv("LITGPT_HOME", str(tmp_path))
    assert checkpoints_home() == tmp_path
    monkeypatch.delenv("LITGPT_HOME")
    assert str(checkpoints_home()) == "checkpoints"


def test_download_converts_unless_told_not_to(hub, tmp_path, capsys):
    save_tiny("llama", hub.folder)
    download_from_hub(REPO)
    assert "lit_model.pth" in names(tmp_path / "home" / REPO)
    download_from_hub(REPO, convert_checkpoint=False, checkpoint_dir=tmp_path / "other")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "other" / REPO)
    assert names(tmp_path / "other" / REPO) == names(hub.folder)


@pytest.mark.parametrize(("repo_id", "message"), [("smollm2-135", "Did you mean 'SmolLM2-135M'"), ("../x", "org/name")])
def test_what_is_no_model_name_is_refused(repo_id, message):
    with pytest.raises(ValueError, match=message):
        download_from_hub(repo_id)


def test_list_shows_names_and_sizes_and_filters_them(capsys):
    download_from_hub("list", filter="smollm2 instruct")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[1].split() == ["HuggingFaceTB/SmolLM2-1.7B-Instruct", "1.71", "B", "8,192"]
    download_from_hub("list")
    assert len(capsys.readouterr().out.splitlines()) > 200
    with pytest.raises(ValueError, match="'nothing of this kind'"):
        download_from_hub("list", filter="nothing of this kind")
    with pytest.raises(ValueError, match="goes with `litgpt download list`"):
        download_from_hub(REPO, filter="x")


@pytest.mark.parametrize(
    ("name", "published"),
    [("SmolLM2-135M", 134_515_008), ("Llama-3.2-1B", 1_235_814_400), ("Qwen2.5-0.5B", 494_032_768)]
    + [("pythia-14m", 14_067_712), ("Gemma-2-2b", 2_614_341_888), ("Llama-3-8B", 8_030_261_248)],
)
def test_parameters_are_those_that_are_published(name, published):
    assert num_parameters(Config.from_name(name), is_tied(name)) == published


@pytest.mark.parametrize("name", ["Gemma-3-4b-it", "Mixtral-8x7B-v0.1", "DeepSeek-V3"])
def test_equal_layers_are_counted_without_being_made(name):
    config = Config.from_name(
        name, n_layer=7, n_embd=64, n_head=8, n_expert=0 if "Gemma" in name else 16, n_query_groups=None
    )
    with torch.device("meta"):
        model = GPT(config)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())
