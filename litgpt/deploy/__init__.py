"""LitGPT's place for `litgpt serve`, which is in `litgpt.serve`."""
