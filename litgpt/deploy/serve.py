"""`litgpt serve` by LitGPT's module path."""

from litgpt.serve.base import main as run_server

__all__ = ["run_server"]
