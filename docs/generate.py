"""Write the pages that are generated from the code: settings.md and cli.md. Run by `make docs`.

A test compares the pages with what this module returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from proxy.cli import app
from proxy.settings.schema import Settings

PAGES = Path(__file__).parent
GENERATED = "<!-- Written by `make docs` from the code; do not edit. -->\n\n"
HELP_WIDTH = 100

SETTINGS_HEAD = """\
# Settings

The configuration is LiteLLM's YAML with one section of ours, `uniroute`. It is given by `--config` or
`UNIROUTE_CONFIG`, and has at most 1 MB and 64 levels. Unknown keys are refused, and the message names the nearest known
one. LiteLLM's own sections and keys that have no meaning here are ignored with a warning that names them.

```yaml
model_list:
  - model_name: small
    litellm_params: {model: openai/small, api_base: "http://127.0.0.1:9001/v1", api_key: os.environ/SMALL_API_KEY}
    model_info: {input_cost_per_token: 1.0e-7, output_cost_per_token: 4.0e-7, max_input_tokens: 32000}
uniroute:
  lambda: 0.1
  default_model: small
```

`model_list` is described in [Models](models.md). All other settings are keys of the section `uniroute`.

Every setting can also be given as `UNIROUTE_<NAME>` in the environment, which overrides the file; options of the
command override both. `profile.prompts` is `UNIROUTE_PROFILE_PROMPTS`; lists are written with commas. `litellm_params`
may refer to a variable of the environment (`os.environ/NAME_API_KEY`). A variable that may not be used is refused at
the start, and one that is not set is named there. A bad value is reported by its variable, its option, or its file and
key, whichever states it.

A model that a setting names must exist, if there is no admin API or its name is nearly that of another model; otherwise
the setting is refused at the start.
"""

GROUPS: dict[str, tuple[str, ...]] = {
    "Routing": (
        *("model_list", "lambda", "route_names", "presets", "default_model", "housekeeping"),
        *("trajectory", "trajectory_weight"),
        *("latency_weight", "cost_unit", "reference_price", "map", "embedder", "recipe", "compiled"),
        "clamp_max_tokens",
    ),
    "Measuring": (
        *("validation_set", "judge_model"),
        *("profile.prompts", "profile.max_usd", "profile.concurrency", "profile.on_start", "profile.timeout_s"),
        "profile.keep_answers",
    ),
    "Prices": ("price_url", "price_refresh_minutes"),
    "Conversations": (
        *("sticky_sessions", "session_ttl_s", "prompt_cache_s"),
        *("response_ttl_s", "max_responses_per_key", "max_response_bytes", "max_stored_bytes_per_key"),
    ),
    "Timeouts and fallbacks": (
        *("fallback_attempts", "request_timeout_s", "connect_timeout_s", "first_token_timeout_s", "idle_timeout_s"),
        *("stream_timeout_s", "keep_alive_s", "queue_wait_s"),
    ),
    "Cooldown": (
        *("breaker.failures", "breaker.share", "breaker.window_s", "breaker.cooldown_s", "breaker.longest_cooldown_s"),
    ),
    "Decisions": ("decision_ttl_s", "max_decisions", "max_decision_bytes", "max_decisions_per_s", "log_prompts"),
    "Feedback": ("feedback", "feedback_half_life_s", "feedback_labels_per_key", "feedback_per_minute"),
    "Sizes": ("max_body_bytes", "max_answer_bytes", "max_answers_in_flight_bytes"),
    "Limits of client keys": ("reserve_output_tokens", "limits_timeout_s", "limits_without_store"),
    "Access": ("admin_key", "allowed_env", "allowed_hosts", "allowed_origins"),
    "Server": ("host", "port", "workers", "worker_health_timeout_s", "drain_s", "log_format"),
    "Store": (
        *("data_dir", "usage_journal_max_bytes", "redis_url", "redis_username", "redis_password"),
        *("redis_sentinel_username", "redis_sentinel_password", "redis_ca_file", "redis_cert_file", "redis_key_file"),
    ),
}

CLI_HEAD = """\
# Commands

Where a command has `--json`, it writes machine-readable output alone to stdout. The exit status is 2 for bad arguments
and 1 for failed work. Commands that talk to a server find it by `--url` or `UNIROUTE_URL`, and send
`UNIROUTE_ADMIN_KEY` or `UNIROUTE_API_KEY`.
"""


def settings_page() -> str:
    fields = dict(named_fields(Settings))
    sections = []
    for title, names in GROUPS.items():
        rows = "".join(_row(name, fields.pop(name)) for name in names)
        sections.append(f"\n## {title}\n\n| setting | default | allowed | meaning |\n|---|---|---|---|\n{rows}")
    if fields:
        raise ValueError(f"no group of the settings page has {', '.join(fields)}")
    return GENERATED + SETTINGS_HEAD + "".join(sections)


def named_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Each setting by its name in YAML; those of a nested section as `section.name`."""
    for name, field in model.model_fields.items():
        public = prefix + (field.alias or name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from named_fields(field.annotation, f"{public}.")
        else:
            yield public, field


def _row(name: str, field: FieldInfo) -> str:
    if not field.description:
        raise ValueError(f"the setting {name} has no description")
    return f"| `{name}` | {_default(field.default)} | {_allowed(field)} | {field.description} |\n"


def _default(value: Any) -> str:
    if value is None or value == () or value == {}:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str | Path):
        return f"`{value}`"
    if isinstance(value, tuple):
        return ", ".join(f"`{each}`" for each in value)
    if isinstance(value, int | float):
        return f"{value:.12g}"
    return f"{value.input_cost_per_token:g}, {value.output_cost_per_token:g}"


def _allowed(field: FieldInfo) -> str:
    kind = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if kind is bool:
        return "`true`, `false`"
    if SecretStr in (kind, *get_args(kind)):
        return "a secret"
    bounds = {
        side: getattr(each, side) for each in field.metadata for side in ("ge", "gt", "le") if hasattr(each, side)
    }
    low = f"{bounds['ge']:g}" if "ge" in bounds else f"above {bounds['gt']:g}" if "gt" in bounds else ""
    if "le" not in bounds or bounds["le"] >= 10**9:  # so high that it only keeps out misspelt numbers
        return f"{low} or more" if "ge" in bounds else low
    high = f"{bounds['le']:.12g}"
    return f"{low} to {high}" if low else f"at most {high}"


def cli_page() -> str:
    root = typer.main.get_command(app)
    sections = [f"\n{level} {path}\n\n```text\n{text}\n```\n" for level, path, text in _commands(root, "uniroute")]
    return GENERATED + CLI_HEAD + "".join(sections)


def _commands(command: Any, path: str, level: str = "##") -> Iterator[tuple[str, str, str]]:
    """(heading, command line, its --help) of a command and those below it."""
    context = command.make_context(path, [], resilient_parsing=True, terminal_width=HELP_WIDTH)
    yield level, path, "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    for name, below in getattr(command, "commands", {}).items():
        yield from _commands(below, f"{path} {name}", "##" if hasattr(below, "commands") else "###")


def pages() -> dict[str, str]:
    return {"settings.md": settings_page(), "cli.md": cli_page()}


if __name__ == "__main__":
    for name, text in pages().items():
        (PAGES / name).write_text(text, "utf-8")
