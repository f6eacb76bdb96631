"""An optimizer that makes runs of two packages comparable: both take it by its import path."""

import torch


class SameStartAdamW(torch.optim.AdamW):
    """AdamW at one learning rate, whatever a schedule says, from initial values that do not depend on who drew them.

    Matrices of LoRA and of adapters that were initialised at random are drawn anew, in the order of the layers; what begins
    as a constant, and the weights of a checkpoint (`redraw=False`), stay.
    """

    def __init__(self, params, lr: float, redraw: bool, **kwargs) -> None:
        params = list(params)
        super().__init__(params, lr=lr, **kwargs)
        self.fixed_lr = lr
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in params if redraw else ():
                if parameter.requires_grad and parameter.ndim == 2 and parameter.min() != parameter.max():
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = self.fixed_lr
        return super().step(closure)
