"""LangChain's client against the server; skipped where it is not installed."""

import pytest

langchain = pytest.importorskip("langchain_openai")


def test_invoke_and_stream(server, llm):
    chat = langchain.ChatOpenAI(
        base_url=f"{server}/v1", api_key="none", model="tiny", temperature=0, max_tokens=12, stream_usage=True
    )
    expected = llm.generate("Hello", max_new_tokens=12, temperature=0)
    answer = chat.invoke("Hello")
    assert answer.content == expected
    assert answer.usage_metadata["output_tokens"] == 12
    chunks = list(chat.stream("Hello"))
    assert "".join(chunk.content for chunk in chunks) == expected
    assert [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata] == [12]
