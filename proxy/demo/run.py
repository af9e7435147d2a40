"""The demo: local models measured and routed by a server of its own. Steps: arms, report, chat."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from proxy.app import check_data_dir
from proxy.cli import console
from proxy.cli.client import FINISHED, ServerClient
from proxy.cli.console import CommandError, say
from proxy.demo.arms import Arm, start_arms
from proxy.demo.chat import ask_three
from proxy.demo.report import show_profiles
from proxy.server.run import LOGGING, BackgroundServer, address, listen
from proxy.settings.models import SettingsError
from proxy.settings.schema import Settings
from router_core.validation.builtin import builtin_validation_set

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


def measure_arms(client: ServerClient, arms: Sequence[tuple[Arm, str]], prompts: int) -> None:
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
