"""Questions about long texts, made by a random generator: for comparing caches and for training."""
