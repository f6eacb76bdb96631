"""Generating: sampling, stopping, the decode loop, sessions, and the commands that use them."""
