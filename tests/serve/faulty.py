"""`litgpt serve` in which things go wrong on demand, by files in a folder.

While `wait` exists the model is not loaded; while `hang` exists a step does not end. `fail` makes the next step fail, `die` ends the
engine's thread.
"""

import time

from litgpt.__main__ import main
from litgpt.engine.continuous import ContinuousBatch
from litgpt.model import GPT
from litgpt.serve import app, base


def run(orders, stuck_after, arguments):
    """Run `litgpt` with the arguments; `orders` is the folder, a step is taken for stuck after so many seconds."""
    load, forward, step = base.make_ready, GPT.forward, ContinuousBatch.step

    def wait_for(order):
        while (orders / order).exists():
            time.sleep(0.02)

    def faulty_load(*args, **settings):
        wait_for("wait")
        return load(*args, **settings)

    def faulty_step(batch):
        wait_for("hang")
        return step(batch)

    def faulty_forward(*args, **settings):
        for order, error in (("fail", RuntimeError("the step has failed")), ("die", SystemExit())):
            if (orders / order).exists():
                (orders / order).unlink()
                raise error
        return forward(*args, **settings)

    base.make_ready, GPT.forward, ContinuousBatch.step = faulty_load, faulty_forward, faulty_step
    app.STUCK_AFTER = stuck_after
    return main(arguments)
