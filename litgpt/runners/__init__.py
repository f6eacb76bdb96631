"""Faster ways to run all layers of a model, and the weight layouts that they read."""
