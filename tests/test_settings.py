import json
import warnings

import pytest

from litgpt.settings import Settings, described, fits, listed, read_json, read_yaml, shown

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("value", "kinds"),
    [
        (3, {"int", "float"}),
        (3.5, {"float"}),
        (True, {"bool"}),
        ("3", {"str"}),
        (None, {"null"}),
        (float("nan"), set()),
        (float("inf"), set()),
        (10**400, {"int"}),
        ([1, 2], {"list"}),
        ([1, True], set()),
        ({}, {"dict"}),
    ],
    ids=lambda value: repr(sorted(value) if isinstance(value, set) else value),  # the same in every process
)
def test_a_value_is_of_a_kind_or_not(value, kinds):
    names = {"int": int, "float": float, "bool": bool, "str": str, "null": type(None), "list": list[int], "dict": dict}
    assert {name for name, kind in names.items() if fits(value, kind)} == kinds


def test_kinds_may_be_alternatives_and_are_described_in_words():
    assert fits(None, int | None)
    assert not fits("x", int | None)
    assert described(int | None) == "a whole number or null"
    assert described(list[str]) == "a list, each entry a text"


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda s: s.whole("text"), "file: text = '7' must be a whole number"),
        (lambda s: s.whole("missing"), "file lacks 'missing'"),
        (lambda s: s.whole("negative"), "file: negative = -1 must be from 1 to 2147483647"),
        (lambda s: s.whole("null"), "file: null = None must be a whole number"),
        (lambda s: s.number("nan"), "file: nan = nan must be a finite number"),
        (lambda s: s.number("negative", positive=True), "file: negative = -1 must be positive"),
        (lambda s: s.flag("text"), "file: text = '7' must be true or false"),
        (lambda s: s.section("text"), "file: text = '7' must be names with values"),
        (lambda s: s.section("part").number("x"), "file: part.x = 'a' must be a finite number"),
        (lambda s: s.section("part").number("y"), "file lacks 'part.y'"),
        (lambda s: s.token_ids("negative"), "file: negative = -1 must be ids of tokens"),
        (lambda s: s.only("text", ("8", "9"), "8", "this"), "text = '7' is not supported for this, only '8' or '9'"),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_file_and_the_name(read, message):
    values = {"text": "7", "negative": -1, "null": None, "nan": float("nan"), "part": {"x": "a"}}
    with pytest.raises(ValueError, match="file") as error:
        read(Settings(values, "file"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_defaults_are_for_what_is_left_out_and_null_only_where_it_may_be():
    settings = Settings({"a": 5, "null": None})
    assert settings.whole("a", 7) == 5
    assert settings.whole("b", 7) == 7
    assert settings.whole("null", 7, null=True) is None
    assert settings.flag("null", True) is True
    assert len(settings.section("null")) == 0
    assert settings.token_ids("a") == [5]
    assert settings.token_ids("b") == []


def test_values_and_lists_are_shown_short():
    nested = [None]
    for _ in range(50):
        nested = [nested] * 50
    assert len(shown(nested)) < 200
    assert len(shown("x" * 10_000)) < 100
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(100)]) == "0, 1, 2, 3, 4, ... (100 in all)"


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '"x"', DEEP, '{"a": ' * 5000, "nul", "\udcff", '{"a": ' + "9" * 5000 + "}"]
)
@pytest.mark.parametrize("repair", [False, True])
def test_what_is_no_json_object_is_named(text, repair, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="x.json") as error:
        read_json(path, repair)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_byte_order_mark_does_not_matter(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "b": [2, 3,], "c": ",}",}',
        '{"a": 1\n"b": [2, 3]\n\n  "c": ",}"}',
        '{"a": 1,\n"b": [2, 3],\n"c": ",}",\n}',
    ],
)
def test_commas_are_mended_with_a_warning_where_that_is_asked_for(text, tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match="generation_config.json is not valid JSON"):
        assert read_json(path, repair=True) == {"a": 1, "b": [2, 3], "c": ",}"}
    with pytest.raises(ValueError, match="not valid JSON"):
        read_json(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path.write_text(json.dumps({"a": 1}))
        assert read_json(path, repair=True) == {"a": 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1",
        "a: [",
        "1: 2",
        DEEP,
        "a: 2020-13-45",
        "a: !!python/object:x {}",
        "\udcff\udcfe",
        "a: !!int x",
        "? [1]\n: 2",
    ],
)
def test_what_is_no_yaml_of_names_and_values_is_named(text, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="x.yaml") as error:
        read_yaml(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
