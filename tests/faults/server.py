"""Starts runs of `jaxuda.main` as real processes quickly: it has imported everything, and forks.

Reads one JSON object per line: {"words": [after "jaxuda"], "output": stem of its files, "longest": seconds, "fault":
{...}}. Answers with a process id when the run has begun, and with its wait status when it has ended. No JAX backend is
started in this process.

A fault happens at the n-th use of a file below a folder, counted by Python's audit events, so that a seed decides
where: {"do": "kill" | "terminate" | "full" | "readonly", "at": n, "delay": seconds, "folder": DIR}.
"""

import errno
import faulthandler
import json
import os
import signal
import sys
import threading
import time

from jaxuda import main
from jaxuda.methods import source_only  # noqa: F401
from jaxuda.sweeps import pseudo_label  # noqa: F401
from jaxuda.training import loop  # noqa: F401 (imported once for all children)

USES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.scandir", "os.listdir"}
CHANGES = USES - {"open", "os.scandir", "os.listdir"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ERRORS = {"full": errno.ENOSPC, "readonly": errno.EROFS}
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}


class Fault:
    """An audit hook that counts uses of files below a folder, and makes the fault happen at one of them."""

    def __init__(self, folder: str, do: str = "", at: int = 0, delay: float = 0.0):
        self._folder, self._do, self._at, self._delay = folder, do, at, delay
        self.uses, self._struck = 0, False

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in USES or not str(arguments[0]).startswith(self._folder):
            return
        self.uses += 1
        if self._do in SIGNALS and self.uses == self._at:
            threading.Thread(target=self._signal, daemon=True).start()
            if not self._delay:
                time.sleep(0.05)  # so that the signal arrives here
        writes = event in CHANGES or (event == "open" and arguments[2] & WRITING)
        if self._do in ERRORS and self.uses >= self._at and writes:
            number = ERRORS[self._do]
            raise OSError(number, os.strerror(number), str(arguments[0]))

    def _signal(self) -> None:
        time.sleep(self._delay)
        os.kill(os.getpid(), SIGNALS[self._do])


def run(order: dict) -> None:
    """Runs in a child process and never returns."""
    os.setsid()
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        file = os.open(f"{order['output']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream.fileno())
    faulthandler.dump_traceback_later(0.9 * order["longest"])  # shows where a run hangs
    hook = Fault(**order["fault"])
    sys.addaudithook(hook)
    code = 1
    try:
        code = main.main(["jaxuda", *order["words"]])
    except BaseException:
        import traceback

        traceback.print_exc()
    with open(f"{order['output']}.uses", "w") as file:
        file.write(str(hook.uses))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(child: int, longest: float) -> int | str:
    """The wait status of a child; "hung" if it had to be killed after `longest` seconds."""
    ends = time.monotonic() + longest
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung"


def serve() -> None:
    """Serves orders until the input ends."""
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            run(order)
        print(child, flush=True)
        print(wait(child, order["longest"]), flush=True)


if __name__ == "__main__":
    serve()
