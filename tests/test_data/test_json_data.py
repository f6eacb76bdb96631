"""JSON and JSONL: what is read, and how each broken file is refused."""

import json

import pytest
from tiny import tiny_tokenizer

from litgpt.chat_template import ChatTemplate
from litgpt.data import JSON, Alpaca, LongTexts
from litgpt.data.json_data import Samples, read_samples
from litgpt.prompt_style import PromptStyle
from litgpt.train.setting import plain

GOOD = {"instruction": "Say hi.", "output": "hi"}


def talk(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def connected(path, batch_size=2, **options):
    data = JSON(path, **{"val_split_fraction": 0.0, **options})
    data.connect(tiny_tokenizer(), batch_size=batch_size, max_seq_length=512)
    data.prepare_data()
    data.setup()
    return data


def test_a_file_too_small_to_be_divided_is_learned_whole(tmp_path, recwarn):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD]))
    data = connected(path, val_split_fraction=None)
    assert (len(data.train_dataset), data.val_dataloader()) == (1, None)
    assert [str(w.message) for w in recwarn] == ["val_split_fraction is not given: 0.05 of the samples validate"]


BAD = [
    ("a.json", "", r"a\.json is empty"),
    ("a.json", "[]", r"a\.json holds no samples"),
    ("a.json", "{}", r"a\.json must hold a list of samples, got dict"),
    ("a.json", '[\n{"instruction": "a",\n]', r"a\.json, line 3: not valid JSON"),
    ("a.json", "[1]", r"a\.json, sample 0: expected a mapping .* got int"),
    ("a.json", "[" * 100_000, r"a\.json, .*nested too deeply"),
    ("a.json", [GOOD, {"output": "a"}], r"a\.json, sample 1 lacks 'instruction'"),
    ("a.json", [GOOD, {"instruction": "a"}], r"a\.json, sample 1 lacks 'output'"),
    ("a.json", [{"instruction": "a", "output": 4}], r"sample 0: output = 4 must be a text"),
    ("a.json", [{"instruction": None, "output": "a"}], r"sample 0: instruction = None must be a text"),
    ("a.json", [GOOD | {"input": 4}], r"sample 0: input = 4 must be a text or null"),
    ("a.jsonl", json.dumps(GOOD) + "\n\n{oops}\n", r"a\.jsonl, line 3: not valid JSON"),
    ("a.jsonl", json.dumps(GOOD) + '\n"text"\n', r"a\.jsonl, line 2: expected a mapping .* got str"),
    ("a.jsonl", b'{"instruction": "a", "output": "b"}\n\xff\n', r"a\.jsonl, line 2: not UTF-8"),
    ("a.jsonl", "\n\n", r"a\.jsonl is empty"),
    ("a.json", [{"messages": "hi"}], r"sample 0: messages = 'hi' must be a list"),
    ("a.json", [{"messages": []}], r"sample 0: 'messages' has no answer of the assistant"),
    ("a.json", [{"messages": ["hi"]}], r"sample 0: messages = \['hi'\] must be a list, each entry names"),
    (
        "a.json",
        [talk(("human", "a"), ("assistant", "b"))],
        r"sample 0: messages\[0\]: role = 'human' is not supported for messages, only 'system' or",
    ),
    ("a.json", [talk(("user", "a"), ("assistant", None))], r"sample 0: messages\[1\]: content = None must be a text"),
    ("a.json", [talk(("user", "a"))], r"'messages' has no answer of the assistant"),
    ("a.json", [{"conversations": [{"from": "human", "value": "a"}]}], r"has no answer of the assistant"),
    ("a.json", [{"conversations": ["hi"]}], r"sample 0: conversations = \['hi'\] must be a list, each entry names"),
    ("a.json", [{"conversations": [{"from": ["x"], "value": "a"}]}], r"messages\[0\]: role = \['x'\] is not supported"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=range(len(BAD)))
def test_a_broken_file_is_refused_with_line_and_field(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )
    with pytest.raises(ValueError, match=message):
        connected(path).train_dataloader()


def test_what_is_no_file_of_samples_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        JSON(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="should not be set for the folder"):
        JSON(tmp_path, val_split_fraction=0.1)
    with pytest.raises(FileNotFoundError, match=r"containing train\.json or train\.jsonl"):
        connected(tmp_path, val_split_fraction=None)
    (tmp_path / "a.json").write_text(json.dumps([GOOD]))
    for fraction in (-0.1, 1, 2):
        with pytest.raises(ValueError, match="val_split_fraction must be at least 0 and below 1"):
            JSON(tmp_path / "a.json", val_split_fraction=fraction)


def test_nothing_is_lost(tmp_path):
    samples = [{"instruction": f"Say {i}.", "output": str(i), "input": None} for i in range(23)]
    (tmp_path / "a.json").write_text(json.dumps(samples))
    data = connected(tmp_path / "a.json", val_split_fraction=0.2, batch_size=4)
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    decode = data.tokenizer.decode
    texts = [decode(ids) for batch in batches for ids in batch["input_ids"]]
    assert {text.split("Response:\n")[1].rstrip("!") for text in texts} >= {str(i) for i in range(23)}
    assert len(texts) == 23


def test_lines_end_with_line_feeds_only(tmp_path):
    path = tmp_path / "a.jsonl"
    sample = {"instruction": "a\u2028b\x85c", "output": "d\u2029"}
    path.write_text("\ufeff" + json.dumps(sample, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read_samples(path) == [sample]


def test_a_folder_has_a_file_for_each_split(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(GOOD) for _ in range(3)))
    (tmp_path / "val.json").write_text(json.dumps([GOOD]))
    data = connected(tmp_path, val_split_fraction=None)
    assert (len(data.train_dataloader()), len(data.val_dataloader())) == (2, 1)


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_conversations_are_written_by_the_checkpoints_template(form, tmp_path):
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao")]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sample = (
        talk(*turns)
        if form == "messages"
        else {"conversations": [{"from": names[role], "value": text} for role, text in turns]}
    )
    (tmp_path / "a.jsonl").write_text(json.dumps(sample))
    data = connected(tmp_path / "a.jsonl")
    assert isinstance(data.prompt_style, ChatTemplate)
    (batch,) = data.train_dataloader()
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    text = data.tokenizer.processor.decode(ids.tolist(), skip_special_tokens=False)
    assert text == "".join(f"<|{role}|>{content}<|end|>" for role, content in turns)
    assert (
        data.tokenizer.processor.decode(ids[labels >= 0].tolist(), skip_special_tokens=False)
        == "Hello<|end|>Ciao<|end|>"
    )


@pytest.mark.parametrize("make", [lambda path: JSON(path, val_split_fraction=0.0), lambda path: LongTexts(path=path)])
def test_the_style_is_that_of_each_checkpoint(make, tmp_path):
    record = {"context": "c", "question": "q", "answer": "b"}
    (tmp_path / "a.json").write_text(json.dumps([talk(("user", "a"), ("assistant", "b")) | record]))
    data = make(tmp_path / "a.json")
    for template in ("{% for m in messages %}<{{ m.content }}>{% endfor %}", None):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        data.connect(tokenizer)
        data.setup()
        kind = ChatTemplate if template else PromptStyle.styles["alpaca"]
        assert type(data.prompt_style) is type(data.train_dataset.prompt_style) is kind


def test_a_sample_that_the_template_rejects_is_named_by_its_line(tmp_path):
    lines = [talk(("user", "a"), ("assistant", "b")), talk(("user", "stop"), ("assistant", "b"))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = connected(tmp_path / "a.jsonl")
    template = "{% for m in messages %}{% if m.content == 'stop' %}{{ raise_exception('stop') }}{% endif %}{{ m.content }}{% endfor %}"
    data.train_dataset.prompt_style = ChatTemplate(template)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: .*stop"):
        data.train_dataloader()


@pytest.mark.parametrize("bad", [{"instruction": "b"}, talk(("user", "a"))])
@pytest.mark.parametrize("place", [0, 10, 19])
def test_a_wrong_sample_of_a_list_is_named_by_its_place_in_the_list(place, bad):
    def loaders():
        data.setup()
        return data.train_dataloader(), data.val_dataloader()

    good = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 19
    data = Samples(given=[*good[:place], bad, *good[place:]], val_split_fraction=0.5)  # half of them, shuffled
    data.connect(tiny_tokenizer())
    with pytest.raises(ValueError, match=rf"^sample {place}(:| lacks) '(output|messages)'"):
        loaders()


def test_calls_of_tools_are_read(tmp_path):
    sample = talk(("user", "Time?"), ("assistant", None), ("tool", "12:00"), ("assistant", "Noon."))
    sample["messages"][1]["tool_calls"] = [{"function": {"name": "clock", "arguments": {}}}]
    (tmp_path / "a.json").write_text(json.dumps([sample]))
    assert read_samples(tmp_path / "a.json") == [sample]


def test_arguments_may_come_in_litgpts_order_and_the_data_are_there_after_setup(tmp_path):
    path = tmp_path / "samples.json"
    path.write_text(json.dumps([{"instruction": str(i), "output": "x"} for i in range(10)]))
    data = JSON(path, True, 0.2, "alpaca", -1, 7, 0)
    assert (data.mask_prompt, data.ignore_index, data.seed, data.num_workers) == (True, -1, 7, 0)
    assert (data.tokenizer, data.batch_size, data.max_seq_length, data.train_dataset, data.val_dataset) == (
        None,
        1,
        -1,
        None,
        None,
    )
    data.connect(tiny_tokenizer())
    data.setup()
    assert (len(data.train_dataset), len(data.val_dataset)) == (8, 2)
    alpaca = Alpaca(True, 0.1, "alpaca", -100, 3, 0, tmp_path)
    assert (alpaca.val_split_fraction, alpaca.seed, alpaca.download_dir) == (0.1, 3, tmp_path)


@pytest.mark.parametrize("form", ["messages", "samples"])
@pytest.mark.parametrize("mask_prompt", [None, False, True])
def test_of_conversations_only_answers_are_learned_unless_the_mask_is_chosen(mask_prompt, form, tmp_path):
    sample = GOOD if form == "samples" else talk(("user", "a"), ("assistant", "b"))
    (tmp_path / "a.json").write_text(json.dumps([sample]))
    data = connected(tmp_path / "a.json", **({} if mask_prompt is None else {"mask_prompt": mask_prompt}))
    (batch,) = data.train_dataloader()
    is_masked = form == "messages" if mask_prompt is None else mask_prompt
    assert bool((batch["labels"] < 0).any()) == is_masked == data.mask_prompt
    assert plain(data)["init_args"]["mask_prompt"] == is_masked  # as hyperparameters.yaml has it
