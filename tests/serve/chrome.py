"""A headless Chromium, driven through its remote debugging pipe."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """A page of a browser of its own, which keeps its files in `folder`."""

    def __init__(self, url: str, folder: Path) -> None:
        inward, outward = os.pipe(), os.pipe()
        # the browser reads from descriptor 3 and writes to 4
        given = [fcntl.fcntl(one, fcntl.F_DUPFD, 30) for one in (inward[0], outward[1])]
        flags = (
            "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage --remote-debugging-pipe"
        )
        self._process = subprocess.Popen(
            [PROGRAM, *flags.split(), f"--user-data-dir={folder}", "about:blank"],
            preexec_fn=lambda: [os.dup2(one, to) for one, to in zip(given, (3, 4), strict=True)],
            pass_fds=(3, 4),
            stderr=subprocess.DEVNULL,
        )
        for one in (inward[0], outward[1], *given):
            os.close(one)
        self._to, self._from = os.fdopen(inward[1], "wb"), os.fdopen(outward[0], "rb")
        self._rest, self._number, self._session = b"", 0, None
        target = self.send("Target.createTarget", url=url)["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._to.close(), self._from.close()

    def send(self, method: str, **parameters):
        """Call a method of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            while b"\0" not in self._rest:
                data = os.read(self._from.fileno(), 1 << 16)
                assert data, "the browser has ended"
                self._rest += data
            text, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression: str):
        """The value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + 100
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < until, f"{expression}: {self.value('document.body.innerText')}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            more = text if kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def look(self, width: int, scheme: str, height: int = 800) -> None:
        """Set the width in pixels, and light or dark."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: Path) -> None:
        """Save a screenshot."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))
