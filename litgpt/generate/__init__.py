"""LitGPT's generation functions, and the generate commands."""
