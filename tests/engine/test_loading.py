import logging

from tiny import VOCABULARY, tiny_gpt, tiny_tokenizer

from litgpt.api import LLM, Preprocessor
from litgpt.engine.loading import make_ready


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_told_at_the_start(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    LLM(tiny_gpt(**VOCABULARY), Preprocessor(tokenizer)).save(tmp_path / "fits")
    tokenizer.processor.add_special_tokens(["<|more|>"])
    LLM(tiny_gpt(**VOCABULARY), Preprocessor(tokenizer)).save(tmp_path / "larger")
    with caplog.at_level(logging.WARNING):
        make_ready(tmp_path / "fits")
        assert not caplog.records
        make_ready(tmp_path / "larger")
    assert "262 tokens, the model's embedding only 261 rows" in caplog.text
