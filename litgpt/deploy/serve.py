"""The command `litgpt serve` by LitGPT's name."""

from litgpt.serve.base import main as run_server

__all__ = ["run_server"]
