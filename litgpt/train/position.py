"""How far a training run is."""

import math
from dataclasses import dataclass


@dataclass
class Position:
    """How far a run is."""

    epoch: int = 0
    batches: int = 0  # micro-batches of the epoch, over all processes
    iter_num: int = 0  # iterations of a process
    step_count: int = 0  # optimizer steps
    tokens: int = 0  # over all processes
    samples: int = 0  # over all processes
    counted: int = 0  # tokens that the loss has counted
    seconds: float = 0.0  # of training
    best_loss: float = math.inf  # of a validation
    best_step: int = 0
    worse: int = 0  # consecutive validations without a lower loss
