from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from proxy.cli import console
from proxy.cli.client import FINISHED, ServerClient, show_startup
from proxy.cli.console import CommandError, echo, table
from proxy.cli.local_models import LlamaServer, smollm2, start_llama
from proxy.server.run import LOGGING, Server, address, listen, server_config
from proxy.server.startup import check_data_dir
from proxy.settings.model_config import SettingsError
from proxy.settings.outbound import http_client
from proxy.settings.schema import Settings
from router_core.validation.families.registry import builtin_validation_set

if TYPE_CHECKING:
    from openai import OpenAI


CONTEXT_TOKENS = 2048

# Requests that each llama.cpp process answers at once.
SLOTS = 4

# Of the built-in prompts the easiest to answer in a few words: at others models this small differ by luck only.
FAMILY = "general_facts"

MAX_ANSWER_TOKENS = 40

# Columns of a terminal that the three answers are shown in.
WIDTH = 100

POLL_INTERVAL_S = 0.3


@dataclass(frozen=True)
class DemoModel:
    """A model with its parameters. Prices are USD per million tokens, and notional: these models cost nothing."""

    name: str
    about: str
    input_cost: float
    output_cost: float
    parameters: dict[str, Any] = field(default_factory=dict)

    def registration(self, api_base: str, prompts: int) -> dict[str, Any]:
        """Return the body of POST /admin/models."""
        return {
            "model_name": self.name,
            "litellm_params": {"model": f"openai/{self.name}", "api_base": api_base, **self.parameters},
            "model_info": {
                "input_cost_per_token": self.input_cost / 1e6,
                "output_cost_per_token": self.output_cost / 1e6,
                "max_input_tokens": CONTEXT_TOKENS,
            },
            "profile": {"prompts": prompts, "max_usd": 1.0},
        }


_SYSTEM = "You are a helpful assistant. Answer briefly with the answer only."

# Three settings of one model, so that the demonstration downloads one file of weights.
MODELS = (
    DemoModel(
        "smollm2",
        "SmolLM2-135M-Instruct, temperature 0",
        2.50,
        10.0,
        {"system": _SYSTEM, "stop": [".", "\n"], "temperature": 0},
    ),
    DemoModel(
        "smollm2-hot",
        "the same weights, temperature 1.8",
        0.50,
        2.0,
        {"system": _SYSTEM, "stop": [".", "\n"], "temperature": 1.8},
    ),
    DemoModel(
        "smollm2-word",
        "the same weights, stopped after a word",
        0.10,
        0.4,
        {"system": _SYSTEM, "stop": [" ", "\n"], "temperature": 0},
    ),
)


@dataclass(frozen=True)
class Question:
    text: str
    meaning: str
    cost_weight: float | None = None
    """λ; None: the server's default."""


QUESTIONS = (
    Question("What is the capital of Italy?", "the default"),
    Question("What is the capital of Italy?", "the price counts more", 1.0),
    Question("What is the capital of Italy?", "the price counts most", 5.0),
)


def run_demo(settings: Settings, *, prompts: int, once: bool) -> None:
    """Measure three models, route three questions, and serve until Ctrl-C, or not at all if `once`."""
    check_data_dir(settings)
    settings = demo_settings(settings)
    check_data_dir(settings)
    started = time.monotonic()
    with ExitStack() as stack:
        write_questions(Path(settings.validation_set), prompts)
        echo("UniRoute demo: three settings of a real language model, on this machine alone")
        models = stack.enter_context(start_models(settings.data_dir))
        bound = listen_somewhere(settings)
        server = BackgroundServer(settings, bound, file_logging(settings.data_dir / "server.log"))
        stack.callback(server.stop)
        if not server.start():
            raise CommandError(f"the server did not start; see {settings.data_dir / 'server.log'}")
        url = address(bound)
        client = stack.enter_context(ServerClient(url, admin_key(settings)))
        measure(client, models, prompts)
        show_profiles(client, prompts)
        ask_questions(url)
        echo(f"\n{time.monotonic() - started:.0f} s in all.")
        if once:
            echo('Next: `make demo` serves these models; `make serve ARGS="--config config.yaml"` serves yours.')
        else:
            show_next_steps(url, settings)
            wait_for_ctrl_c(server)


def demo_settings(settings: Settings) -> Settings:
    """Return settings with a data folder of the demo's own, and with an admin key if none is set."""
    key = settings.admin_key or SecretStr(secrets.token_urlsafe(24))
    folder = settings.data_dir / "demo"
    changed = {"data_dir": folder, "admin_key": key, "redis_url": None, "workers": 1}
    return settings.model_copy(update={**changed, "validation_set": str(folder / "validation.jsonl")})


def admin_key(settings: Settings) -> str:
    assert settings.admin_key is not None
    return settings.admin_key.get_secret_value()


def write_questions(path: Path, count: int) -> None:
    """Write the validation set of the demo: the easiest questions of general knowledge."""
    questions = [prompt for prompt in builtin_validation_set() if prompt.family == FAMILY]
    easy = sorted(questions, key=lambda prompt: prompt.level or 0)[:count]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(prompt.to_json())}\n" for prompt in easy), "utf-8")


@contextmanager
def start_models(folder: Path) -> Iterator[list[tuple[DemoModel, str]]]:
    """Start llama.cpp and yield each model with its address: two processes, which share the memory of the weights."""
    # One thread each: llama.cpp's threads wait for each other in busy loops, and slow down what else runs.
    threads = max(1, (os.cpu_count() or 2) // 2)
    with ExitStack() as stack:
        servers: list[LlamaServer] = [
            stack.enter_context(
                start_llama(
                    smollm2(), folder / f"llama-{n}.log", threads=threads, slots=SLOTS, context=CONTEXT_TOKENS * SLOTS
                )
            )
            for n in range(2)
        ]
        # The first and the last share a server: the last writes little, and reads what the first has read.
        yield [(model, servers[n % 2].api_base) for n, model in enumerate(MODELS)]


def listen_somewhere(settings: Settings) -> socket.socket:
    """Listen on the configured port, or on a free one where that is taken."""
    try:
        return listen(settings.host, settings.port)
    except SettingsError:
        echo(f"port {settings.port} is taken; using a free one")
        return listen(settings.host, 0)


def file_logging(path: Path) -> dict[str, Any]:
    """Return a logging configuration that writes to a file, away from the bars and tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = {"class": "logging.FileHandler", "formatter": "line", "filename": str(path), "mode": "w"}
    return {**LOGGING, "handlers": {"stderr": handler}}


def measure(client: ServerClient, models: Sequence[tuple[DemoModel, str]], prompts: int) -> None:
    """Add each model with the call that adds any model, and wait until all are measured."""
    known = {card["model_name"] for card in client.call("GET", "/admin/models")["models"]}
    jobs = {}
    for model, api_base in models:
        if model.name in known:  # from an earlier demo, at an address that is gone
            client.call("DELETE", f"/admin/models/{model.name}")
        jobs[model.name] = client.call("POST", "/admin/models", model.registration(api_base, prompts))["job"]
    with console.progress() as bars:
        while jobs:
            for name, job in list(jobs.items()):
                state = client.show_job(job, bars)
                if state["state"] in FINISHED:
                    del jobs[name]
                    if state["state"] != "ready":
                        raise CommandError(f"measuring {name} {state['state']}: {state['error']}")
            time.sleep(POLL_INTERVAL_S)


def show_profiles(client: ServerClient, prompts: int) -> None:
    echo(f"\nMeasured, by POST /admin/models: {prompts} questions of general knowledge to each, at notional prices")
    rows = []
    for model in MODELS:
        profile = client.call("GET", f"/admin/models/{model.name}")["profile"]
        rows.append(
            (
                f"{model.name}: {model.about}",
                f"{model.input_cost:.2f} / {model.output_cost:.2f}",
                f"{profile['mean_error']:.2f}",
                f"{profile['mean_output_tokens']:.0f}",
                f"{profile['mean_seconds']:.1f}",
            )
        )
    table(("model", "$/M in / out", "mean error", "tokens", "seconds"), rows)


def ask_questions(url: str) -> None:
    """Ask the three questions as any client would, and show for each who was chosen and why."""
    from openai import OpenAI

    echo('\nRouted, by POST /v1/chat/completions with model "auto": expected errors, and USD per 1,000 requests')
    key = os.environ.get("UNIROUTE_API_KEY") or "not-needed-on-this-machine"
    http = http_client(timeout=600)
    with OpenAI(base_url=f"{url}/v1", api_key=key, http_client=http) as client, ServerClient(url, key) as server:
        for question in QUESTIONS:
            decision = server.call("POST", "/v1/route", _body(question))
            weight = f"λ = {decision['lambda']:g}, {question.meaning}"
            echo(f"  {question.text}  ({weight})")
            ask(client, question)
            echo(f"    {candidates_sentence(decision)}")


def ask(client: OpenAI, question: Question) -> None:
    """Show the tokens as they come, after the name of the model that was chosen."""
    create = client.chat.completions.with_raw_response.create
    reply = create(
        model="auto",
        messages=[{"role": "user", "content": question.text}],
        max_tokens=MAX_ANSWER_TOKENS,
        stream=True,
        extra_headers={} if question.cost_weight is None else {"lambda": f"{question.cost_weight:g}"},
    )
    lead = f"    {reply.headers.get('x-uniroute-model')}: "
    echo(lead, end="")
    room = WIDTH - len(lead)
    for chunk in reply.parse():
        if room > 0 and chunk.choices and (text := chunk.choices[0].delta.content):
            shown = text.replace("\n", " ")[:room]
            room -= len(shown)
            echo(shown, end="")
    echo("" if room > 0 else "…")


def candidates_sentence(decision: Mapping[str, Any]) -> str:
    """Say what to expect of each candidate, the best one first."""
    expected = [
        (each["model"].removeprefix("smollm2-"), each["expected_error"], 1e3 * each["expected_cost_usd"])
        for each in decision["candidates"]
    ]
    return "; ".join(f"{name} {error:.2f} at ${usd:.3f}" for name, error, usd in expected)


def _body(question: Question) -> dict[str, Any]:
    """Return the request for `/v1/route`, which explains the decision."""
    body: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": question.text}]}
    body["max_tokens"] = MAX_ANSWER_TOKENS
    if question.cost_weight is not None:
        body["uniroute"] = {"lambda": question.cost_weight}
    return body


def show_next_steps(url: str, settings: Settings) -> None:
    echo(f"""
It serves at {url}/v1 until Ctrl-C: point any OpenAI client there, with model "auto". In another terminal:

  curl {url}/v1/chat/completions -H 'content-type: application/json' -i \\
    -d '{{"model": "auto", "messages": [{{"role": "user", "content": "What is the capital of Italy?"}}]}}'

To add a model of your own, start the demo with its key (OPENAI_API_KEY=… make demo), then:

  export UNIROUTE_ADMIN_KEY={admin_key(settings)} UNIROUTE_URL={url}
  uniroute models add gpt-6-luna --model openai/gpt-6-luna --api-key-env OPENAI_API_KEY --max-usd 0.5
""")


def wait_for_ctrl_c(server: BackgroundServer) -> None:
    try:
        server.wait()
    except KeyboardInterrupt:
        echo("stopping")


class BackgroundServer:
    """A server in a thread of this process, which ends with the process."""

    def __init__(self, settings: Settings, bound: socket.socket, logging: dict[str, Any]) -> None:
        self._server = Server(server_config(settings, logging=logging))
        self._drain_s = settings.drain_s
        self._bound = bound
        self._ended = threading.Event()  # a join() that Ctrl-C interrupts would count the thread as ended
        self._thread = threading.Thread(target=self._run, name="uniroute-server", daemon=True)

    def start(self) -> bool:
        """Start, show the progress, and return whether the server is ready; False if the start failed."""
        self._thread.start()
        with console.progress() as bars:
            while not self._server.is_ready and not self._ended.wait(POLL_INTERVAL_S):
                if self._server.app_startup is not None:
                    show_startup(self._server.app_startup.to_json(), bars)
        return self._server.is_ready and not self._ended.is_set()

    def wait(self) -> None:
        """Wait until the server has ended by itself."""
        while not self._ended.wait(0.5):
            pass

    def stop(self) -> None:
        self._server.should_exit = True
        self._ended.wait(self._drain_s + 10)

    def _run(self) -> None:
        try:
            self._server.run([self._bound])
        finally:
            self._ended.set()
