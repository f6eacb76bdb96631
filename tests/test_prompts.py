import importlib
import json
import sys
import threading
from pathlib import Path
from subprocess import run

import pytest
import tokenizers
import yaml
from tiny import CHATML
from transformers import PreTrainedTokenizerFast
from until import until

from litgpt import prompts, template_sandbox
from litgpt.config import Config
from litgpt.prompts import (
    ChatML,
    ChatTemplate,
    Default,
    PromptStyle,
    all_stop_tokens,
    encode_prompt,
    has_prompt_style,
    load_prompt_style,
    model_name_to_prompt_style,
    prompt_styles,
    save_prompt_style,
    style_for,
)
from litgpt.tokenizer import Tokenizer

FACTS = json.loads((Path(__file__).parent / "data" / "prompt_styles.json").read_text(encoding="utf-8"))
CONVERSATION = [
    {"role": "system", "content": "SYSTEM"},
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
]

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ZEPHYR = """{% for message in messages %}
    {% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
    {% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
    {% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
    {% endif %}
    {% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
    {% endif %}
{% endfor %}"""
HELPERS = """{%- set ns = namespace(turns=0) %}
    {%- for message in messages %}
        {%- if ns.turns >= 3 %}{%- break %}{%- endif %}
        {%- set ns.turns = ns.turns + 1 %}
        {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
        {%- else %}{{ message | tojson }}{{ [message.content] | tojson(indent=2) }}{% endif %}
    {%- endfor %}
    {%- if tools is not none %}TOOLS{% endif %}{{ strftime_now('%Y') | length }}
    {%- if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "helpers": HELPERS,
}


class NamesAsIds:
    """A tokenizer that gives every token a telling id, as the reference facts do."""

    eos_id = 7

    def token_to_id(self, token: str) -> str:
        return f"id({token})"


def tiny_tokenizer(chat_template: str | None = None, **kwargs) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<|im_end|>", "<unk>", "hello", "there"])}
    processor = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    processor.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    processor.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    arguments = {"bos_id": 0, "eos_id": 1, "use_bos": True, "chat_template": chat_template} | kwargs
    return Tokenizer.from_tokenizers(processor, **arguments)


def reference_render(template: str, messages: list[dict], **kwargs) -> str:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().processor, bos_token="<s>", eos_token="</s>", chat_template=template
    )
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)


def ours(template: str) -> ChatTemplate:
    return ChatTemplate(template, bos_token="<s>", eos_token="</s>")


class OnlyStrings(PromptStyle):
    def apply(self, prompt, *, sys_prompt=None, **kwargs):
        return f"<{sys_prompt or 'own'}|{prompt.upper()}>"

    def stop_tokens(self, tokenizer):
        return ([tokenizer.eos_id], [5, 4])


def test_import_takes_no_torch():
    code = "import sys, litgpt.prompts; print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    result = run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.stdout.strip() == "[]", result.stderr


# --- built-in styles


@pytest.mark.parametrize("name", FACTS["styles"])
def test_every_row_of_the_facts_renders_exactly(name):
    row, style = FACTS["styles"][name], PromptStyle.from_name(name)
    assert type(style).__name__ == row["class"]
    assert type(style) is prompt_styles[name] is getattr(prompts, row["class"])
    # LitGPT leaves out a bar here; the template of the model has it.
    expected = {key: text.replace("<|im_start>", "<|im_start|>") for key, text in row.items() if isinstance(text, str)}
    assert style.apply("PROMPT") == expected["prompt"]
    assert style.apply("PROMPT", sys_prompt="SYSTEM") == expected["prompt+sys"]
    assert style.apply("PROMPT", input="INPUT") == expected["prompt+input"]
    if "messages" in expected:
        assert style.apply(CONVERSATION) == expected["messages"]
    assert [list(sequence) for sequence in style.stop_tokens(NamesAsIds())] == row["stop_tokens"]


@pytest.mark.parametrize(("model_name", "expected"), FACTS["model_to_style"].items())
def test_every_model_name_gets_its_style(model_name, expected):
    assert type(model_name_to_prompt_style(model_name)).__name__ == expected
    assert type(model_name_to_prompt_style(f"some-org/{model_name}")).__name__ == expected


def test_from_config_goes_by_the_name():
    assert isinstance(PromptStyle.from_config(Config(name="Gemma-2-2b-it")), prompts.Gemma)
    assert isinstance(PromptStyle.from_config(Config(name="something else")), Default)


@pytest.mark.parametrize(
    ("style", "single", "stops"),
    [
        (Default(), "PROMPT", ([7],)),
        (ChatML(), "<|im_start|>user\nPROMPT<|im_end|>\n<|im_start|>assistant\n", ([7],)),
        (
            ChatML("Be brief."),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nPROMPT<|im_end|>\n<|im_start|>assistant\n",
            ([7],),
        ),
        (
            prompts.Falcon3(),
            "<|user|>\nPROMPT<|endoftext|>\n<|assistant|>\n",
            ([7], ["id(<|endoftext|>)"]),
        ),
        (prompts.R1Base(), "<｜User｜>PROMPT<｜Assistant｜>", ([7], ["id(<｜end▁of▁sentence｜>)"])),
    ],
)
def test_styles_outside_the_facts(style, single, stops):
    assert style.apply("PROMPT") == single
    assert style.stop_tokens(NamesAsIds()) == stops


@pytest.mark.parametrize("name", prompt_styles)
def test_conversations_agree_with_single_prompts_and_grow_at_the_end(name):
    style = PromptStyle.from_name(name)
    system, first, answer, second = CONVERSATION
    assert style.apply([first]) == style.apply("Q1")
    assert style.apply([system, first]) == style.apply("Q1", sys_prompt="SYSTEM")
    assert style.apply(CONVERSATION[1:], sys_prompt="SYSTEM") == style.apply(CONVERSATION)
    assert style.apply(CONVERSATION, sys_prompt="another") == style.apply(CONVERSATION)
    text = style.apply(CONVERSATION)
    assert text.startswith(style.apply([system, first]) + "A1")
    assert [text.count(word) for word in ("Q1", "A1", "Q2")] == [1, 1, 1]
    assert text.endswith(style.answer_start)
    assert style.render(CONVERSATION) == text


@pytest.mark.parametrize(
    ("name", "template", "start"),
    [
        ("smollm2", CHATML, ""),
        ("llama3", LLAMA3, ""),
        ("gemma", GEMMA, "<s>"),
        ("tinyllama", ZEPHYR, ""),
    ],
)
def test_conversations_are_as_in_the_templates_of_the_models(name, template, start):
    messages = CONVERSATION[1:] if name == "gemma" else CONVERSATION
    special_tokens = {"bos_token": "<|begin_of_text|>"} if name == "llama3" else {}
    expected = reference_render(template, messages, **special_tokens)
    assert start + PromptStyle.from_name(name).apply(messages) == expected


def test_braces_and_backslashes_in_messages_stay_as_they_are():
    text = r"\1 {user} {system} {{x}} \n"
    assert ChatML().apply(text, sys_prompt=text).count(text) == 2


def test_alpaca_takes_an_input_with_a_system_text():
    text = prompts.Alpaca().apply("PROMPT", sys_prompt="SYSTEM", input="INPUT")
    assert text == "SYSTEM### Instruction:\nPROMPT\n\n### Input:\nINPUT\n\n### Response:\n"


def test_an_empty_system_message_silences_the_default_one():
    silent = prompts.SmolLM2().apply([{"role": "system", "content": ""}, {"role": "user", "content": "Q"}])
    assert silent == "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


def test_stop_sequences_of_unknown_tokens_are_left_out():
    assert prompts.Llama3().stop_tokens(tiny_tokenizer()) == ([1],)
    assert prompts.Phi1().stop_tokens(tiny_tokenizer()) == ([1],)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([{"role": "tool", "content": "x"}], r"message 0 .*'tool'.*system, user, assistant"),
        ([{"role": "user", "content": "x"}, "y"], "message 1 is 'y'"),
        ([{"role": "user"}], "message 0"),
        ([{"role": "system", "content": "x"}], "at least one user message"),
        ([], "at least one user message"),
    ],
)
@pytest.mark.parametrize("style", [ChatML(), OnlyStrings()])
def test_a_malformed_conversation_is_named(messages, match, style):
    with pytest.raises(ValueError, match=match):
        style.render(messages)


def test_an_unknown_style_name_suggests_near_ones():
    with pytest.raises(ValueError, match=r"unknown prompt style 'lama3'; choose from llama3"):
        PromptStyle.from_name("lama3")
    with pytest.raises(ValueError, match=r"'\?'; choose from .*alpaca.*salamandra"):
        PromptStyle.from_name("?")


# --- custom styles


def test_a_custom_style_for_strings_renders_conversations_turn_by_turn():
    style = OnlyStrings()
    assert style.render("q1") == "<own|Q1>"
    assert style.render(CONVERSATION) == "<SYSTEM|Q1>A1<own|Q2>"
    assert encode_prompt(tiny_tokenizer(), style, CONVERSATION).dim() == 1
    assert all_stop_tokens(tiny_tokenizer(eos_ids=[2]), style) == ([1], [2], [5, 4])


def test_a_custom_style_may_take_messages_itself():
    class Both(OnlyStrings):
        takes_messages = True

        def apply(self, prompt, *, sys_prompt=None, **kwargs):
            return prompt if isinstance(prompt, str) else f"{len(prompt)} messages"

    assert Both().render(CONVERSATION) == "4 messages"


def test_overriding_apply_of_a_built_in_style_for_strings_is_safe():
    class Polite(ChatML):
        def apply(self, prompt, *, sys_prompt=None, **kwargs):
            return super().apply("Please: " + prompt, sys_prompt=sys_prompt)

    assert Polite().render(CONVERSATION).count("Please: Q") == 2


def test_a_custom_style_registers_under_a_name_and_for_models(monkeypatch):
    monkeypatch.setattr(PromptStyle, "styles", dict(PromptStyle.styles))
    monkeypatch.setattr(PromptStyle, "_style_of_models", dict(PromptStyle._style_of_models))

    class Mine(OnlyStrings, name="mine", models=r"my-model-\d+b"):
        pass

    assert isinstance(PromptStyle.from_name("mine"), Mine)
    assert isinstance(model_name_to_prompt_style("me/My-Model-7b"), Mine)
    assert isinstance(model_name_to_prompt_style("my-model-7b-base"), Default)


def test_a_style_without_apply_says_so():
    class Nothing(PromptStyle):
        pass

    with pytest.raises(NotImplementedError, match="Nothing does not define apply"):
        Nothing().apply("x")


# --- chat templates


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("length", [1, 2, 3])
def test_chat_template_renders_as_transformers(name, length):
    messages = [
        {"role": "user", "content": ' <b>Häuser & "Wörter"</b> \'s\n'},
        {"role": "assistant", "content": "日本語 {{ no_template }}"},
        {"role": "user", "content": "{% raw %}"},
    ][:length]
    assert ours(TEMPLATES[name]).apply(messages) == reference_render(TEMPLATES[name], messages)


@pytest.mark.parametrize("name", ["chatml", "llama3", "zephyr", "helpers"])
def test_chat_template_renders_system_messages_as_transformers(name):
    expected = reference_render(TEMPLATES[name], CONVERSATION)
    assert ours(TEMPLATES[name]).apply(CONVERSATION) == expected
    assert ours(TEMPLATES[name]).apply(CONVERSATION[1:], sys_prompt="SYSTEM") == expected
    assert ours(TEMPLATES[name]).apply(CONVERSATION, sys_prompt="another") == expected


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_chat_template_without_system_role_gets_the_text_in_the_first_user_message(name):
    folded = [{"role": "user", "content": "SYSTEM\n\nQ1"}, *CONVERSATION[2:]]
    expected = reference_render(TEMPLATES[name], folded)
    assert ours(TEMPLATES[name]).apply(CONVERSATION) == expected
    assert CONVERSATION[1]["content"] == "Q1"


def test_chat_template_takes_single_prompts_and_variables():
    assert ours(CHATML).apply("Q1") == prompts.SmolLM2().apply("Q1")
    assert ours(CHATML).apply("Q1", sys_prompt="S") == prompts.SmolLM2().apply("Q1", sys_prompt="S")
    assert ChatTemplate("{{ bos_token + messages[0].content + eos_token }}").apply("Q1") == "Q1"
    assert ours(CHATML).apply("Q1", messages="a field of a data set") == ours(CHATML).apply("Q1")
    assert ours(HELPERS).apply("Q1", enable_thinking=False).endswith("<think></think>")


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{% for m in messages %}", r"chat template is broken, line 1: TemplateSyntaxError"),
        ("{{ messages[0].nothing.further }}", "chat template is broken: UndefinedError"),
        ("{{ messages | no_such_filter }}", "chat template is broken, line 1: .*no_such_filter"),
        ("{{ 1 / 0 }}", "chat template is broken: ZeroDivisionError"),
        ("{{ messages.__class__.__mro__ }}", "chat template is broken: SecurityError"),
        ("{{ messages.append(1) }}", "chat template is broken: SecurityError"),
        ("{{ raise_exception('Only on Sundays') }}", "rejects this conversation: Only on Sundays"),
    ],
)
def test_a_template_that_fails_is_one_clear_error(template, match):
    with pytest.raises(ValueError, match=match) as error:
        ours(template).apply("Q1", sys_prompt="S")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("messages", [[], [{"content": "x"}], ["x"]])
def test_a_chat_template_names_malformed_messages(messages):
    with pytest.raises(ValueError, match="list of messages"):
        ours(CHATML).apply(messages)


# --- encoding and stopping


class AlwaysBos:
    """A foreign tokenizer that prepends BOS (0) whenever it is not told otherwise."""

    bos_token, eos_id = "<s>", 1

    def encode(self, string, bos=None):
        return ([0] if bos is None else []) + [0 if word == "<s>" else 3 for word in string.split()]


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), AlwaysBos()])
def test_bos_is_never_doubled(tokenizer):
    class WithBos(OnlyStrings):
        def apply(self, prompt, *, sys_prompt=None, **kwargs):
            return "<s> " + prompt

    assert list(encode_prompt(tokenizer, WithBos(), "hello there")).count(0) == 1
    assert list(encode_prompt(tokenizer, Default(), "hello there")).count(0) == 1


def test_encode_prompt_passes_everything_on():
    ids = encode_prompt(tiny_tokenizer(use_bos=False), ours("{% for m in messages %}{{ m.content }} {% endfor %}{{ x }}"),
                        "hello", sys_prompt="there", x="</s>")  # fmt: skip
    assert ids.tolist() == [5, 4, 1]


def test_stop_tokens_are_one_set():
    tokenizer = tiny_tokenizer(eos_ids=[2, 1])
    assert all_stop_tokens(tokenizer, Default()) == ([1], [2])
    assert all_stop_tokens(tokenizer, ours(CHATML)) == ([1], [2])
    assert all_stop_tokens(NamesAsIds(), prompts.Falcon()) == ([7], ["id(User)", "id(:)"], [193, "id(User)"])
    assert all_stop_tokens(tiny_tokenizer(eos_id=None, use_bos=False), Default()) == ()


# --- saving, loading, choosing


def test_saved_file_is_the_one_litgpt_writes(tmp_path):
    assert not has_prompt_style(tmp_path)
    save_prompt_style("qwen2.5", tmp_path)
    assert has_prompt_style(tmp_path)
    assert (tmp_path / "prompt_style.yaml").read_text() == "class_path: litgpt.prompts.Qwen2_5\n"
    assert [path.name for path in tmp_path.iterdir()] == ["prompt_style.yaml"]


@pytest.mark.parametrize("name", prompt_styles)
def test_every_style_survives_saving(tmp_path, name):
    save_prompt_style(name, tmp_path)
    assert yaml.safe_load((tmp_path / "prompt_style.yaml").read_text())["class_path"].startswith("litgpt.prompts.")
    assert type(load_prompt_style(tmp_path)) is prompt_styles[name]


class WithoutArguments(ChatML):
    def __init__(self) -> None:
        super().__init__("set by the subclass")


@pytest.mark.parametrize("style", [ChatML("Ünd: 'so'\n"), OnlyStrings(), WithoutArguments(), ours(MISTRAL)])
def test_styles_with_arguments_and_of_users_survive_saving(tmp_path, style):
    save_prompt_style(style, tmp_path)
    loaded = load_prompt_style(tmp_path)
    assert type(loaded) is type(style)
    assert loaded.apply("Q1") == style.apply("Q1")


@pytest.mark.parametrize(
    "content",
    [
        "class_path: os.getcwd",
        "class_path: subprocess.Popen\ninit_args: {args: [touch, x]}",
        "class_path: no_such_module.Style",
        "class_path: litgpt.prompts.NoSuchStyle",
        "class_path: ChatML",
        "class_path: litgpt.prompts.Alpaca\ninit_args: {x: 1}",
        "class_path: litgpt.prompts.ChatML\ninit_args: 3",
        "class_path: 3",
        "just text",
        "",
        "a: [",
        "- " * 5000,
        "x: 2024-99-99",
    ],
)
def test_a_file_that_describes_no_style_is_refused(tmp_path, content):
    (tmp_path / "prompt_style.yaml").write_text(content)
    with pytest.raises(ValueError, match="prompt_style.yaml does not describe a prompt style") as error:
        load_prompt_style(tmp_path)
    assert "\n" not in str(error.value)


def test_a_saved_style_imports_no_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_styles.py").write_text("from litgpt.prompts import ChatML\nclass Own(ChatML):\n    pass\n")
    (tmp_path / "prompt_style.yaml").write_text("class_path: own_styles.Own")
    with pytest.raises(ValueError, match=r"own_styles\.Own is no style of litgpt\.prompts; import a PromptStyle class"):
        load_prompt_style(tmp_path)
    assert "own_styles" not in sys.modules
    own = importlib.import_module("own_styles").Own
    assert type(load_prompt_style(tmp_path)) is own
    del sys.modules["own_styles"]


def test_no_saved_style_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="prompt_style.yaml"):
        load_prompt_style(tmp_path)


def test_the_style_of_a_checkpoint_is_the_saved_one_then_its_template_then_its_name(tmp_path):
    config = Config(name="SmolLM2-135M-Instruct")
    plain, templated = tiny_tokenizer(), tiny_tokenizer(chat_template=MISTRAL)
    assert type(style_for(tmp_path, plain, config)) is prompts.SmolLM2
    assert type(style_for("org/Phi-3-mini-4k-instruct", None, None)) is prompts.Phi3
    assert type(style_for(tmp_path, None, Config(name="unheard of"))) is Default
    by_template = style_for(tmp_path, templated, config)
    assert by_template.apply("Q1") == reference_render(MISTRAL, CONVERSATION[1:2]) == "<s>[INST] Q1 [/INST]"
    save_prompt_style("alpaca", tmp_path)
    assert type(style_for(tmp_path, templated, config)) is prompts.Alpaca


SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "sep_token": "[SEP]"}
SPECIALS |= {"cls_token": "[CLS]", "mask_token": "[MASK]", "image_token": "<image>"}
TURNS = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": "Übung \n 2", "name": None},
    {"role": "assistant", "content": "4", "reasoning": "hm"},
    {"role": "user", "content": "And 3?"},
]
FEATURES = {
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token }}{{ cls_token }}{{ mask_token }}",
    "a token of one model": "{{ image_token }}",
    "undefined": "{{ nothing }}{% if nothing is defined %}x{% endif %}{{ nothing|default('d') }}",
    "defined": "{% for n in ['a', 'b'] %}{% if pad_token is defined and pad_token is not none %}{{ n }}{% endif %}{% endfor %}",
    "tools": "{% if tools is none %}no tools{% endif %}{% if not documents %}none{% endif %}{% if tools is defined %}!{% endif %}",
    "prompt": "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "tojson": "{{ messages|tojson }}{{ messages[0]|tojson(indent=2) }}{{ {'b': 1, 'a': 2}|tojson(sort_keys=true) }}",
    "separators": "{{ [1, 'ü']|tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "loop controls": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 3 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "strftime": "{{ strftime_now('%Y') }}",
    "none fields": "{% for m in messages %}{{ 'name' in m }}{{ m.name is defined }}{% endfor %}",
    "reasoning": "{{ messages[2].reasoning_content }}{{ messages[2].thinking }}{{ messages[2].reasoning }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "trimming": "{% for m in messages %}\n  {% if loop.last %}\n    {{- m.content }}\n  {% endif %}\n{% endfor %}\nend",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content|length %}{% endfor %}{{ ns.n }}",
    "macros": "{% macro t(m, x='-') %}{{ m.role ~ x ~ m.content|trim }}{% endmacro %}{% for m in messages %}{{ t(m) }}{% endfor %}",
    "methods": "{{ messages[1].content.strip().split(' ')[-1] }}{{ 'a,b'.split(',')|join(';') }}{{ '%s-%02d' % ('x', 3) }}{{ 'a{}b'.format(1) }}",
    "filters": "{{ messages|map(attribute='role')|join(', ') }}{{ messages|selectattr('role', 'eq', 'user')|list|length }}{{ 'x'|upper|indent(2, true) }}{{ 2.6|round|int }}{{ [3, 1]|sort|first }}",
    "slices": "{{ messages[::-1][0].content }}{{ messages[1:]|length }}{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "arithmetic": "{{ 2 * 3 + 7 % 4 }}{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ [1] + [2] }}{{ 7 // 2 }}{{ 'n: ' ~ 3 ~ none }}",
    "capture": "{% set x %}{% for m in messages %}{{ m.role[0] }}{% endfor %}{% endset %}{{ x|replace('u', 'U') }}",
    "html": "{{ messages[0].content }}{{ messages[0].content|e }}{{ '<'|safe }}",
}


@pytest.mark.parametrize("case", FEATURES)
def test_templates_render_as_with_transformers(case):
    processor = tiny_tokenizer().processor
    theirs = PreTrainedTokenizerFast(tokenizer_object=processor, chat_template=FEATURES[case], **SPECIALS)
    ours = ChatTemplate(FEATURES[case], **SPECIALS)
    for messages in (TURNS, TURNS[:2]):
        if "2]" in FEATURES[case] and len(messages) < 3:
            continue
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.apply(messages) == expected


def test_every_special_token_of_a_folder_reaches_the_template(tmp_path):
    template = "{{ bos_token }}{{ unk_token }}{{ pad_token }}{{ image_token }}{{ boi_token }}"
    tiny_tokenizer().processor.save(str(tmp_path / "tokenizer.json"))
    config = {"chat_template": template, "unk_token": {"content": "<u>"}, "image_token": "<i>", "bos_token": None}
    config["extra_special_tokens"] = {"boi_token": "<b>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<p>", "unk_token": "<other>"}))
    tokenizer = Tokenizer(tmp_path)
    assert ChatTemplate.from_tokenizer(tokenizer).apply("x") == "<u><p><i><b>"
    tokenizer.save(tmp_path / "again")
    assert ChatTemplate.from_tokenizer(Tokenizer(tmp_path / "again")).apply("x") == "<u><p><i><b>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10**9 }}",
        "{{ 10**9 * 'x' }}",
        "{{ ['x'] * 10**9 }}",
        "{{ (('x' * 1000000),) * 1000000 }}",
        "{{ 'x'|center(1000000000) }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ 'x'|indent(1000000000, true) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d'|format(1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ [1]|tojson(indent=1000000000) }}",
        "{{ (['x' * 1000000] * 100000)|join }}",
        "{{ ('x' * 1000000).join(['a'] * 1000000) }}",
        "{{ ('x' * 1000000)|replace('x', 'y' * 1000000) }}",
        "{{ ('x' * 1000000).replace('', 'y' * 1000000) }}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ 'x' * 1000 }}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{{ 9 ** 9999 ** 99 }}",
        "{{ 9 ** 99999 }}",
    ],
)
def test_a_template_that_would_fill_the_memory_is_stopped_before_its_time_is_up(template, monkeypatch):
    monkeypatch.setattr(template_sandbox, "SECONDS", 60)
    with pytest.raises(ValueError, match="chat template was stopped: it (makes|raises|computes)") as error:
        ChatTemplate(template).apply("x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("body", ["", "{% set y = c %}"])
def test_a_template_that_never_ends_is_stopped_and_its_thread_too(body, monkeypatch):
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.2)
    before = set(threading.enumerate())
    loops = "".join(f"{{% for {name} in r %}}" for name in "abc")
    template = "{% set r = range(99999) %}" + loops + body + "{% endfor %}" * 3
    with pytest.raises(ValueError, match="was stopped: it takes longer than 0.2 seconds"):
        ChatTemplate(template).apply("x")
    until(lambda: set(threading.enumerate()) <= before)


def test_a_conversation_of_megabytes_is_rendered(monkeypatch):
    monkeypatch.setattr(template_sandbox, "SECONDS", 60)
    messages = [{"role": "user", "content": "word " * 20_000}, {"role": "assistant", "content": "x"}] * 40
    text = ChatTemplate("{% for m in messages %}{{ m.role ~ ': ' + m.content|trim }}{% endfor %}").apply(messages)
    assert len(text) > 3_900_000
