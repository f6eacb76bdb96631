"""The text that caches are compared on."""

from pathlib import Path


def read_document(path: Path | None) -> str:
    """The text of a file (None: the reference on the language that comes with Python).

    Raises:
        FileNotFoundError, ValueError: if there is none, or it is no text.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(text.strip() for text in topics.values())
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8, at byte {error.start}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: it needs text to compare caches on")
    return text


def lines_of(text: str) -> list[str]:
    """The lines of a text that have words, each with its line end."""
    return [f"{line.strip()}\n" for line in text.splitlines() if line.strip()]
