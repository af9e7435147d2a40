"""What each client is told, so that it talks to a UniRoute server: a row a client, in CLIENTS.

No file holds a key: clients read it from their environment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from urllib.parse import urlsplit

AUTO = "auto"

CHEAP = "uniroute/cheap"

KEY_VARIABLE = "UNIROUTE_API_KEY"

# What clients send to a server that asks for no key: most do not start without one.
NO_KEY = "no-key-needed"

# What it asks for where it knows of no limit.
MAX_OPENCODE_OUTPUT_TOKENS = 32_000

_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Target:
    """The server and the model that a client is to use."""

    url: str
    """Without /v1."""
    model: str
    key: str
    folder: str
    """Where the files of its Setup lie, while the client runs."""
    context_tokens: int | None = None
    """The context window of the model, at which a client makes a long conversation shorter; None: not known."""

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"

    @property
    def cheap_model(self) -> str:
        """The model of side tasks, as titles and summaries: the cheapest, unless the user asked for one by name."""
        return CHEAP if self.model == AUTO else self.model


@dataclass(frozen=True)
class Setup:
    """What a client is given: variables, variables that it must not see, files by name, and first arguments."""

    environment: Mapping[str, str]
    unset: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Client:
    name: str
    title: str
    program: str | None
    """None: the first of the user's arguments."""
    install: str
    """The command that installs it."""
    setup: Callable[[Target], Setup]


def _claude(target: Target) -> Setup:
    """Name models as Claude Code does: it takes what it knows of a model from `claude` in its name."""
    named = (target.model,) * 3
    best, usual, cheap = ("claude-best", "claude-auto", "claude-cheap") if target.model == AUTO else named
    return Setup(
        {
            "ANTHROPIC_BASE_URL": target.url,
            "ANTHROPIC_AUTH_TOKEN": target.key,
            "ANTHROPIC_MODEL": usual,
            "ANTHROPIC_DEFAULT_OPUS_MODEL": best,
            "ANTHROPIC_DEFAULT_SONNET_MODEL": usual,
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": cheap,
            "ANTHROPIC_SMALL_FAST_MODEL": cheap,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_TELEMETRY": "1",
            "DISABLE_ERROR_REPORTING": "1",
            # It begins each system prompt with a line that differs from request to request: no prompt cache hits then.
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
            **({"CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(window)} if (window := target.context_tokens) else {}),
        },
        # Its own key would be sent beside ours; the others send it to another service.
        unset=("ANTHROPIC_API_KEY", "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY"),
    )


def _codex(target: Target) -> Setup:
    """Override its configuration on the command line: CODEX_HOME, with the user's sessions, stays as it is."""
    provider = "model_providers.uniroute"
    overrides: dict[str, str | int] = {
        "model_provider": "uniroute",
        "model": target.model,
        f"{provider}.name": "UniRoute",
        f"{provider}.base_url": target.v1,
        f"{provider}.wire_api": "responses",
        f"{provider}.env_key": KEY_VARIABLE,
    }
    if target.context_tokens:
        overrides["model_context_window"] = target.context_tokens
    words = (word for name, value in overrides.items() for word in ("-c", f"{name}={json.dumps(value)}"))
    return Setup({KEY_VARIABLE: target.key}, arguments=tuple(words))


def _opencode(target: Target) -> Setup:
    limit = {}
    if window := target.context_tokens:
        # It wants both numbers, and keeps room for an answer of the second.
        limit = {"limit": {"context": window, "output": min(MAX_OPENCODE_OUTPUT_TOKENS, window // 4)}}
    names = dict.fromkeys((target.model, target.cheap_model))
    config = {
        "provider": {
            "uniroute": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "UniRoute",
                "options": {"baseURL": target.v1, "apiKey": f"{{env:{KEY_VARIABLE}}}"},
                "models": {name: {"name": name, **limit} for name in names},
            }
        },
        "model": f"uniroute/{target.model}",
        "small_model": f"uniroute/{target.cheap_model}",
    }
    return Setup({"OPENCODE_CONFIG_CONTENT": json.dumps(config), KEY_VARIABLE: target.key})


def _aider(target: Target) -> Setup:
    names = (f"openai/{target.model}", f"openai/{target.cheap_model}")
    known: dict[str, str | int] = {"litellm_provider": "openai", "mode": "chat"}
    if target.context_tokens:
        known["max_input_tokens"] = target.context_tokens
    settings = {"name": names[0], "edit_format": "diff", "use_repo_map": True, "weak_model_name": names[1]}
    return Setup(
        {
            "OPENAI_API_BASE": target.v1,
            "OPENAI_API_KEY": target.key,
            "AIDER_MODEL": names[0],
            "AIDER_MODEL_SETTINGS_FILE": f"{target.folder}/aider.model.settings.yml",
            "AIDER_MODEL_METADATA_FILE": f"{target.folder}/aider.model.metadata.json",
            # It warns of every model whose price it does not know.
            "AIDER_SHOW_MODEL_WARNINGS": "false",
        },
        files={
            "aider.model.settings.yml": _json_text([settings]),
            # It looks for models that it does not know in a list on the internet.
            "aider.model.metadata.json": _json_text(dict.fromkeys(names, known)),
        },
    )


def _qwen(target: Target) -> Setup:
    return Setup({"OPENAI_BASE_URL": target.v1, "OPENAI_API_KEY": target.key, "OPENAI_MODEL": target.model})


def _llm(target: Target) -> Setup:
    """Give it a folder of its own, which is where it looks for models: its log of this run goes with the folder."""
    names = dict.fromkeys((target.model, target.cheap_model))
    models = [
        {
            "model_id": name,
            "model_name": name,
            "api_base": target.v1,
            "api_key_name": "uniroute",
            "supports_tools": True,
            "supports_schema": True,
            "vision": True,
        }
        for name in names
    ]
    return Setup(
        {"LLM_USER_PATH": target.folder, "OPENAI_API_KEY": target.key},
        files={"extra-openai-models.yaml": _json_text(models), "default_model.txt": f"{target.model}\n"},
    )


def _env(target: Target) -> Setup:
    return Setup(
        {
            "OPENAI_BASE_URL": target.v1,
            "OPENAI_API_BASE": target.v1,
            "OPENAI_API_KEY": target.key,
            "OPENAI_MODEL": target.model,
            "ANTHROPIC_BASE_URL": target.url,
            "ANTHROPIC_API_KEY": target.key,
            "ANTHROPIC_MODEL": target.model,
        },
        unset=("ANTHROPIC_AUTH_TOKEN",),
    )


CLIENTS = (
    Client("claude", "Claude Code", "claude", "npm install -g @anthropic-ai/claude-code", _claude),
    Client("codex", "Codex", "codex", "npm install -g @openai/codex", _codex),
    Client("opencode", "OpenCode", "opencode", "npm install -g opencode-ai", _opencode),
    Client("aider", "Aider", "aider", "python -m pip install aider-chat", _aider),
    Client("qwen", "Qwen Code", "qwen", "npm install -g @qwen-code/qwen-code", _qwen),
    Client("llm", "llm", "llm", "python -m pip install llm", _llm),
    Client("env", "any other program", None, "", _env),
)


def setup_for(client: Client, target: Target, environ: Mapping[str, str]) -> Setup:
    """Return what the client is given: its own row, and what holds for all of them."""
    own = client.setup(target)
    environment = {**own.environment, **_no_proxy(target.url, environ)}
    # A client may run commands that a model wrote; none of them needs to manage the server.
    return Setup(environment, (*own.unset, "UNIROUTE_ADMIN_KEY"), own.files, own.arguments)


def _no_proxy(url: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Add this machine to NO_PROXY, in both its spellings, if the server is on it."""
    host = urlsplit(url).hostname or ""
    if host not in _LOOPBACK_NAMES and not host.startswith("127."):
        return {}
    stated = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    listed = [name for name in stated.replace(" ", ",").split(",") if name]
    value = ",".join(dict.fromkeys((*listed, host, *_LOOPBACK_NAMES)))
    return {"NO_PROXY": value, "no_proxy": value}


def _json_text(value: object) -> str:
    """Write a value as a file of JSON, which is YAML too."""
    return json.dumps(value, indent=2) + "\n"
