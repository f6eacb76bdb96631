"""Compares key-value caches on one model: quality, memory and speed of every cache at every budget."""
