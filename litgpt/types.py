"""Types that several modules name."""

from typing import Literal

LoggerChoice = Literal["csv", "tensorboard", "wandb", "mlflow", "litlogger"]
