"""The command `litgpt serve`."""

import asyncio
import errno
import logging
import signal
import sys
import threading
import time
from socket import socket
from types import FrameType

import uvicorn

from litgpt.checkpoint.finetuned import Finetuned
from litgpt.engine.loading import lend_weights, make_ready
from litgpt.engine.service import Service
from litgpt.generate.options import command
from litgpt.serve.app import App
from litgpt.serve.options import ServeOptions
from litgpt.serve.served import ServedModel


class Server(uvicorn.Server):
    """A server that lets running answers end after a first SIGTERM or Ctrl-C, and ends at once after a second."""

    def __init__(self, app: App, options: ServeOptions) -> None:
        settings = {"log_level": "warning", "timeout_graceful_shutdown": 3, "server_header": False}
        super().__init__(uvicorn.Config(app, options.host, options.port, lifespan="off", **settings))
        self.app, self.options = app, options
        self.failure: BaseException | None = None

    def _is_logged(self, record: logging.LogRecord) -> bool:
        """Whether uvicorn may log this: not why it cannot listen, which `main` says."""
        if isinstance(record.msg, OSError):
            self.failure = record.msg
        return not isinstance(record.msg, OSError)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.app.draining:
            self.should_exit = self.force_exit = True
            return
        self.app.draining = True
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        service, until = self.app.service, time.monotonic() + self.options.grace
        while service is not None and service.unfinished and time.monotonic() < until and not self.should_exit:
            time.sleep(0.05)
        if service is not None and service.unfinished:
            service.fail_all("the server was shut down")
            time.sleep(0.2)
        self.should_exit = True

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen, then load the models."""
        log = logging.getLogger("uvicorn.error")
        log.addFilter(self._is_logged)
        try:
            await super().startup(sockets)
        finally:
            log.removeFilter(self._is_logged)
        threading.Thread(target=self.load, daemon=True).start()

    def load(self) -> None:
        """Load the models, and let the application answer."""
        try:
            options = self.options
            device = None if options.accelerator == "auto" else _device(options.accelerator)
            loras = {name: Finetuned(folder, "lora") for name, folder in options.loras().items()}
            ready = make_ready(
                options.checkpoint_dir,
                **options.loading(),
                device=device,
                join=not loras,
                check=lambda checkpoint, *_: options.check_caches(checkpoint, options.batch_size),
            )
            name = ready.checkpoint_dir.resolve().name
            if name in loras:
                raise ValueError(
                    f"the model is called {name!r}: give its LoRA weights another name, --lora NAME=FOLDER"
                )
            readies = {name: ready} | {one: lend_weights(ready, finetuned) for one, finetuned in loras.items()}
            room = options.prefix_cache * 1_000_000 // len(readies)
            models = {name: ServedModel.of(name, one, options, room) for name, one in readies.items()}
            service = Service({name: (one.batch, one.ready.tokenizer) for name, one in models.items()})
            service.start()
            self.app.models, self.app.service = models, service
            where = f"http://{options.host}:{options.port}"
            print(f"Serving {', '.join(models)} at {where} (chat page), {where}/v1 (OpenAI's API)", file=sys.stderr)
        except BaseException as error:
            self.failure = error
            self.should_exit = True


def _device(name: str):
    import torch

    return torch.device(name)


@command(ServeOptions, "checkpoint_dir")
def main(options: ServeOptions) -> None:
    """Serve a model over HTTP: OpenAI's endpoints, LitGPT's /predict, and a page to chat with it.

    Ctrl-C or SIGTERM lets running answers end, a second one does not.
    """
    server = Server(App(options), options)
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        asyncio.run(server.serve())
    except SystemExit:
        reason = server.failure
        if isinstance(reason, OSError):
            in_use = reason.errno == errno.EADDRINUSE
            reason = "the port is in use: choose another --port" if in_use else reason.strerror or reason
        raise OSError(f"cannot listen at {options.host}:{options.port}: {reason}") from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if server.app.service is not None:
            server.app.service.close()
    if server.failure is not None:
        raise server.failure
