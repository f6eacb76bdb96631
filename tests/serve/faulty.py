"""`litgpt serve` in which things go wrong on demand, by files in a folder: python faulty.py FOLDER ARGUMENTS.

While `wait` exists the model is not loaded; while `hang` exists a step does not end. `fail` makes the next step fail, `die` ends the
engine's thread.
"""

import sys
import time
from pathlib import Path

from litgpt.__main__ import main
from litgpt.engine.continuous import ContinuousBatch
from litgpt.model import GPT
from litgpt.serve import app, base

orders = Path(sys.argv[1])
load, run, step = base.make_ready, GPT.forward, ContinuousBatch.step


def wait_for(order):
    while (orders / order).exists():
        time.sleep(0.02)


def faulty_load(*args, **settings):
    wait_for("wait")
    return load(*args, **settings)


def faulty_step(batch):
    wait_for("hang")
    return step(batch)


def faulty_run(*args, **settings):
    for order, error in (("fail", RuntimeError("the step has failed")), ("die", SystemExit())):
        if (orders / order).exists():
            (orders / order).unlink()
            raise error
    return run(*args, **settings)


base.make_ready, GPT.forward, ContinuousBatch.step, app.STUCK_AFTER = faulty_load, faulty_run, faulty_step, 0.5
sys.exit(main(sys.argv[2:]))
