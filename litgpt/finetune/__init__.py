"""The commands that fine-tune."""
