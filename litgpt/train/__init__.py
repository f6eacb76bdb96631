"""Training: one loop for fine-tuning and pretraining, and its parts."""
