from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pydantic import SecretStr

from proxy.app import check_data_dir
from proxy.cli import console
from proxy.cli.console import CommandError, say, table, write
from proxy.cli.local_models import LlamaServer, gemma_base, smollm2, start_llama
from proxy.cli.options import FINISHED, ServerClient
from proxy.cli.tools import show_decision
from proxy.outbound import http_client
from proxy.profiling.job import PromptAnswer, answers_key
from proxy.server.run import LOGGING, BackgroundServer, address, listen
from proxy.settings.models import SettingsError
from proxy.settings.schema import Settings
from router_core.artifact import builtin_map
from router_core.validation.families.registry import builtin_validation_set

if TYPE_CHECKING:
    from openai import OpenAI


CONTEXT_TOKENS = 2048

_SLOTS = 4


@dataclass(frozen=True)
class DemoModel:
    """A model with its parameters. Prices are USD per million tokens, and notional: these models cost nothing."""

    name: str
    about: str
    input_cost: float
    output_cost: float
    parameters: dict[str, Any] = field(default_factory=dict)

    def registration(self, api_base: str, prompts: int) -> dict[str, Any]:
        """The body of POST /admin/models."""
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


_BRIEFLY = {"system": "You are a helpful assistant. Answer briefly with the answer only."}

SMOLLM2 = DemoModel("smollm2", "SmolLM2-135M-Instruct at temperature 0", 2.50, 10.0, {**_BRIEFLY, "temperature": 0})

HOT = DemoModel("smollm2-hot", "the same weights at temperature 2.5", 0.50, 2.0, {**_BRIEFLY, "temperature": 2.5})

ECHO = DemoModel(
    "gemma3-base",
    "Gemma 3 270M before instruction tuning, which repeats the question",
    0.10,
    0.4,
    {"temperature": 0, "stop": ["<|im_end|>", "<|im_start|>"]},  # its template is not its own: it never ends a turn
)


def start_arms(stack: ExitStack, folder: Path, announce: Callable[[str], None]) -> list[tuple[DemoModel, str]]:
    """Each arm and the address it answers at. Two processes: the first two arms share their weights."""
    announce("starting SmolLM2-135M-Instruct and Gemma 3 270M under llama.cpp")
    smol = stack.enter_context(_start(smollm2(), folder / "smollm2.log"))
    gemma = stack.enter_context(_start(gemma_base(folder / "models"), folder / "gemma3.log"))
    return [(SMOLLM2, smol.api_base), (HOT, smol.api_base), (ECHO, gemma.api_base)]


def _start(model: Path, log: Path) -> LlamaServer:
    threads = max(1, (os.cpu_count() or 2) // 2)  # there are two servers
    return start_llama(model, log, threads=threads, slots=_SLOTS, context=CONTEXT_TOKENS * _SLOTS)


_MAX_TOKENS = 120


@dataclass(frozen=True)
class Question:
    text: str
    remark: str
    headers: Mapping[str, str] = field(default_factory=dict)


THREE = (
    Question("What is the capital of France?", "the default λ: the price counts a little"),
    Question("What is the capital of France?", "λ = 0: the best answer at any price", {"lambda": "0"}),
    Question("Write one sentence about the sea.", "λ = 2: the price counts a lot", {"lambda": "2"}),
)


def ask_three(url: str) -> None:
    from openai import OpenAI

    key = os.environ.get("UNIROUTE_API_KEY") or "not-needed-on-this-machine"
    http = http_client(timeout=600)
    with OpenAI(base_url=f"{url}/v1", api_key=key, http_client=http) as client, ServerClient(url, key) as dry:
        for number, question in enumerate(THREE, 1):
            say(f"\n── {number}. {question.text}   ({question.remark})")
            ask(client, question)
            show_decision(dry.call("POST", "/v1/route", _body(question)))


def ask(client: OpenAI, question: Question) -> None:
    """Tokens appear as they come; then the headers that say who was chosen."""
    create = client.chat.completions.with_raw_response.create
    reply = create(
        model="auto",
        messages=[{"role": "user", "content": question.text}],
        max_tokens=_MAX_TOKENS,
        stream=True,
        extra_headers=dict(question.headers),
    )
    write("   ")
    for chunk in reply.parse():
        if chunk.choices and (text := chunk.choices[0].delta.content):
            write(text.replace("\n", "\n   "))
    say()
    shown = ("x-uniroute-model", "x-uniroute-reason", "x-uniroute-overhead-ms")
    say("   " + "  ".join(f"{name}: {reply.headers.get(name)}" for name in shown))


def _body(question: Question) -> dict[str, Any]:
    """The same request for the dry run, which tells why."""
    body: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": question.text}]}
    body["max_tokens"] = _MAX_TOKENS
    if "lambda" in question.headers:
        body["uniroute"] = {"lambda": float(question.headers["lambda"])}
    return body


_MAX_CLUSTERS = 8

Scores = Mapping[str, float]


def show_profiles(client: ServerClient, settings: Settings, arms: Sequence[DemoModel]) -> None:
    cards = [client.call("GET", f"/admin/models/{arm.name}") for arm in arms]
    names = [card["model_name"] for card in cards]
    answers = asyncio.run(read_scores(settings, [card["job"]["id"] for card in cards]))
    say()
    by_family(names, answers)
    say()
    by_cluster(cards)
    say()
    over_all(cards)


async def read_scores(settings: Settings, jobs: Sequence[str]) -> list[Scores]:
    """Per job: prompt id → score. Unlabelled answers are left out."""
    from proxy.storage.redis import Store

    store = await Store.open(settings)
    try:
        async with store.operation("read the answers") as client:
            stored = [cast(dict[str, str], await client.hgetall(answers_key(job))) for job in jobs]
    finally:
        await store.close()
    return [_labelled(answers) for answers in stored]


def _labelled(answers: Mapping[str, str]) -> Scores:
    read = {prompt: PromptAnswer.from_json(text) for prompt, text in answers.items()}
    return {prompt: answer.score for prompt, answer in read.items() if answer.score is not None}


def by_family(names: Sequence[str], scores: Sequence[Scores]) -> None:
    """Points of prompts asked; families that nobody got a point in share the last line."""
    families = {prompt.id: prompt.family for prompt in builtin_validation_set()}
    grouped: dict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in names])
    for column, of_model in enumerate(scores):
        for prompt, score in of_model.items():
            grouped[families[prompt]][column].append(score)
    rows = [(family, *map(_points, cells)) for family, cells in sorted(grouped.items()) if any(map(sum, cells))]
    table(("family", *names), rows, title="By family: points of labelled prompts")
    nobody = sorted(family for family, cells in grouped.items() if not any(map(sum, cells)))
    if nobody:
        say(f"  nobody has a point in: {', '.join(nobody)}")


def _points(scores: Sequence[float]) -> str:
    return f"{sum(scores):.3g} of {len(scores)}" if scores else "-"


def by_cluster(cards: Sequence[Mapping[str, Any]]) -> None:
    """Expected error where the label weight is highest."""
    cluster_map = builtin_map()
    weight = np.mean([card["profile"]["labels"] for card in cards], axis=0)
    best = np.argsort(-weight, kind="stable")[:_MAX_CLUSTERS]
    rows = [
        (cluster_map.names[k], f"{weight[k]:.1f}", *(f"{card['profile']['errors'][k]:.2f}" for card in cards))
        for k in best
    ]
    title = f"By cluster: expected error in the {len(rows)} of {cluster_map.size} clusters with the most labels"
    table(("cluster", "labels", *(card["model_name"] for card in cards)), rows, title=title)


def over_all(cards: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        ("mean error", *(f"{card['profile']['mean_error']:.2f}" for card in cards)),
        ("labels", *(f"{sum(card['profile']['labels']):.0f}" for card in cards)),
        ("mean output tokens", *(f"{card['profile']['mean_output_tokens']:.0f}" for card in cards)),
        ("mean seconds", *(f"{card['profile']['mean_seconds']:.1f}" for card in cards)),
    ]
    table(("over all", *(card["model_name"] for card in cards)), rows)


_POLL_S = 0.3

_SHORT_ANSWER_TOKENS = 256


def run_demo(settings: Settings, *, prompts: int, once: bool) -> None:
    """Ends after the three prompts if `once`, else on Ctrl-C."""
    check_data_dir(settings)
    settings = demo_settings(settings)
    check_data_dir(settings)
    started = time.monotonic()
    with ExitStack() as stack:
        write_easy_prompts(Path(settings.validation_set))
        arms = start_arms(stack, settings.data_dir, say)
        bound = listen_somewhere(settings)
        server = BackgroundServer(settings, bound, file_logging(settings.data_dir / "server.log"))
        stack.callback(server.stop)
        if not server.start():
            raise CommandError(f"the server did not start; see {settings.data_dir / 'server.log'}")
        url = address(bound)
        say(f"UniRoute serves at {url}/v1, {time.monotonic() - started:.1f} s after the start")
        client = stack.enter_context(ServerClient(url, admin_key(settings)))
        measure_arms(client, arms, prompts)
        show_profiles(client, settings, [arm for arm, _ in arms])
        ask_three(url)
        say(f"\n{time.monotonic() - started:.0f} s in all.")
        if not once:
            tell_next_steps(url, settings)
            wait_for_ctrl_c(server)


def demo_settings(settings: Settings) -> Settings:
    """A data folder of its own, so that a demo leaves nothing among real models; an admin key, made if none is set."""
    key = settings.admin_key or SecretStr(secrets.token_urlsafe(24))
    folder = settings.data_dir / "demo"
    changed = {"data_dir": folder, "admin_key": key, "redis_url": None, "workers": 1}
    return settings.model_copy(update={**changed, "validation_set": str(folder / "validation.jsonl")})


def write_easy_prompts(path: Path) -> None:
    """The easiest built-in prompts that ask for a short answer: on the others models this small differ by luck only."""
    easy = [p for p in builtin_validation_set() if p.level == 1 and p.max_tokens <= _SHORT_ANSWER_TOKENS]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(prompt.to_json())}\n" for prompt in easy), "utf-8")


def admin_key(settings: Settings) -> str:
    assert settings.admin_key is not None
    return settings.admin_key.get_secret_value()


def listen_somewhere(settings: Settings) -> Any:
    """The usual port, or a free one where that is taken."""
    try:
        return listen(settings.host, settings.port)
    except SettingsError:
        say(f"port {settings.port} is taken; using a free one")
        return listen(settings.host, 0)


def file_logging(path: Path) -> dict[str, Any]:
    """The server's log lines would run through the bars and tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = {"class": "logging.FileHandler", "formatter": "line", "filename": str(path), "mode": "w"}
    return {**LOGGING, "handlers": {"stderr": handler}}


def measure_arms(client: ServerClient, arms: Sequence[tuple[DemoModel, str]], prompts: int) -> None:
    """Add each arm with the call that adds any model, and wait until all are measured."""
    say(f"\nPOST /admin/models for each of {len(arms)} models, asking {prompts} of the easiest validation prompts:")
    for arm, _ in arms:
        say(
            f"  {arm.name:<12} {arm.about}; notional price ${arm.input_cost:g} in, ${arm.output_cost:g} out per million"
        )
    known = {card["model_name"] for card in client.call("GET", "/admin/models")["models"]}
    jobs = {}
    for arm, api_base in arms:
        if arm.name in known:  # from an earlier demo, at an address that is gone
            client.call("DELETE", f"/admin/models/{arm.name}")
        jobs[arm.name] = client.call("POST", "/admin/models", arm.registration(api_base, prompts))["job"]
    follow_all(client, jobs)


def follow_all(client: ServerClient, jobs: Mapping[str, str]) -> None:
    """Bars for all jobs until each has ended. CommandError if one failed."""
    with console.progress() as bars:
        waiting = dict(jobs)
        while waiting:
            for name, job in list(waiting.items()):
                state = client.show_job(job, bars)
                if state["state"] in FINISHED:
                    del waiting[name]
                    if state["state"] != "ready":
                        raise CommandError(f"measuring {name} {state['state']}: {state['error']}")
            time.sleep(_POLL_S)


def tell_next_steps(url: str, settings: Settings) -> None:
    params = '{"model": "openai/gpt-6-luna", "api_key": "os.environ/OPENAI_API_KEY"}'
    body = f'{{"model_name": "gpt-6-luna", "litellm_params": {params}, "profile": {{"max_usd": 0.5}}}}'
    say(f"""
It serves until Ctrl-C. Point any OpenAI client at {url}/v1 with model "auto".

To add a model with an API key, have the key in the environment of the demo (OPENAI_API_KEY=… make demo), then:

  export UNIROUTE_ADMIN_KEY={admin_key(settings)} UNIROUTE_URL={url}
  uniroute models add gpt-6-luna --model openai/gpt-6-luna --api-key-env OPENAI_API_KEY --max-usd 0.5

or, without the progress bar,

  curl $UNIROUTE_URL/admin/models -H "authorization: Bearer $UNIROUTE_ADMIN_KEY" -H "content-type: application/json" \\
    -d '{body}'
""")


def wait_for_ctrl_c(server: BackgroundServer) -> None:
    try:
        server.wait()
    except KeyboardInterrupt:
        say("stopping")
