"""LitGPT's name for the parts that serve a model."""
