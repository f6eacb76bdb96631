"""`litgpt serve`: models over HTTP, for OpenAI's clients and LitGPT's."""
