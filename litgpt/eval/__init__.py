"""Scores of models: log-probabilities and answers, for tasks of the LM Evaluation Harness and for those that need nothing else."""
