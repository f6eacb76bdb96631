import pytest
from tiny import CHAT_TEMPLATE, VOCABULARY, tiny_gpt, tiny_tokenizer

from litgpt.api import LLM, Preprocessor
from litgpt.prompts import ChatTemplate


@pytest.fixture
def model(tmp_path):
    """A folder with a tiny model."""
    LLM(tiny_gpt(**VOCABULARY, block_size=512), Preprocessor(tiny_tokenizer()), ChatTemplate(CHAT_TEMPLATE)).save(
        tmp_path / "model"
    )
    return str(tmp_path / "model")
