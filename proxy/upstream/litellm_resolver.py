"""Ask litellm, in a process of its own, which provider serves a model name.

This module is both sides. The proxy's side is `ProviderLookup`. The child's side is `python -m` of this module: it
reads one query a line on stdin, in JSON, and writes one answer a line on stdout, `{"resolved": …}` or
`{"refused": "why"}`.

So a proxy that only serves models of OpenAI's format never imports litellm, which takes seconds and 190 MiB. The
child's environment holds no key.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import resource
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

from proxy.concurrency import cancel_and_wait, child_process
from proxy.settings.litellm_params import NOT_SERVED, PASSTHROUGH
from proxy.settings.model_config import Forward
from proxy.storage.records import ResolvedProvider
from proxy.upstream.key_scope import DEFAULT_BASES, is_own_address
from proxy.upstream.litellm_transport import import_litellm

log = logging.getLogger("uniroute.upstream")

COMMAND = ("-m", "proxy.upstream.litellm_resolver")

# Until the first answer. litellm's import takes 3 s, and far longer on a machine that starts other things meanwhile.
START_TIMEOUT_S = 120.0

ANSWER_TIMEOUT_S = 30.0

# The child ends after this time without a query: it holds 190 MiB, and other workers wait for their turn.
IDLE_S = 3.0

MAX_WAITING = 1000

MAX_ANSWER_BYTES = 2**20

_POLL_INTERVAL_S = 0.2

# Address space of the child. litellm takes 300 MiB of it, 190 of them in memory.
MAX_MEMORY_BYTES = 2**30

# What litellm raises over a name of another shape than it expects.
LITELLM_NAME_ERRORS = (ValueError, TypeError, LookupError, AttributeError)

# Providers that read OpenAI's chat completions and answer in them: `forward: auto` calls these directly.
OPENAI_COMPATIBLE = PASSTHROUGH | frozenset(
    """
    azure deepseek fireworks_ai groq mistral openrouter together_ai xai
    """.split()
)

# Parameters of a model that a direct call has a place for. Any other parameter for the provider needs litellm.
DIRECT_PARAMS = frozenset(
    """
    api_base base_url api_key organization custom_llm_provider extra_headers headers ssl_verify
    """.split()
)

_TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")

_PROBE_LIMIT = 7

Answer = dict[str, Any]

Answers = Mapping[str, Answer]


class LookupFailed(Exception):
    """litellm could not be asked, or did not answer."""


class NotResolved(ValueError):
    """No provider is known by this name, or it cannot be reached in the way that was asked for."""


class ProviderLookup:
    """Queue queries and let one child process answer them. One per process, on one event loop.

    Of several processes with one data folder one runs a child at a time; the others read what it found.
    """

    def __init__(
        self,
        lock: Path,
        environment: Callable[[], dict[str, str]],
        load: Callable[[], Answers],
        store: Callable[[Answers], Awaitable[None]],
        is_answer: Callable[[Any], bool],
    ) -> None:
        """
        Args:
            load: the answers that any process has stored so far, by key.
            store: keeps an answer for all processes.
        """
        self._lock = lock
        self._environment = environment
        self._load = load
        self._store = store
        self._is_answer = is_answer
        # By key, in order of arrival; the first is the one that the child is working on.
        self._pending: dict[str, tuple[Mapping[str, Any], asyncio.Future[Answer | LookupFailed]]] = {}
        self._arrived = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        """How many queries have no answer yet."""
        return len(self._pending)

    async def lookup(self, queries: Mapping[str, Mapping[str, Any]]) -> dict[str, Answer]:
        """Return the answers by key. Queries with one key are asked once.

        Raises:
            LookupFailed: one of them got no answer.
        """
        if self.pending + len(queries) > MAX_WAITING:
            raise LookupFailed(f"{self.pending} others wait for it")
        loop = asyncio.get_running_loop()
        for key, query in queries.items():
            self._pending.setdefault(key, (query, loop.create_future()))
        futures = {key: self._pending[key][1] for key in queries}
        self._arrived.set()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="uniroute-providers")
        await asyncio.wait(futures.values())
        answers = {}
        for key, future in futures.items():
            answer = future.result()
            if isinstance(answer, LookupFailed):
                raise LookupFailed(str(answer))
            answers[key] = answer
        return answers

    async def aclose(self) -> None:
        await cancel_and_wait(self._worker)

    async def _work(self) -> None:
        reason = LookupFailed("this process ends")
        started, asked = monotonic(), self.pending
        try:
            async with self._turn():
                while self._pending:
                    log.info("litellm is asked who serves %d models, in a process of its own", self.pending)
                    asked = self.pending
                    await self._ask_all()
                    log.info("litellm said who serves %d models, after %.1f s", asked, monotonic() - started)
        except LookupFailed as error:  # it would fail for the others as well, one after the other
            reason = error
            log.warning("litellm did not say who serves %d models: %s", self.pending, error)
        finally:
            for key in tuple(self._pending):
                self._settle(key, reason)

    async def _ask_all(self) -> None:
        """Ask one child until no query comes for a while, or until it dies over one.

        Raises:
            LookupFailed: it never answered.
        """
        async with _resolving_process(self._environment()) as child:
            timeout_s = START_TIMEOUT_S
            while await self._has_query():
                key, (query, _) = next(iter(self._pending.items()))
                try:
                    answer = await _ask(child, query, timeout_s)
                    if not self._is_answer(answer):
                        raise LookupFailed("litellm said something else than was asked")
                except LookupFailed as error:
                    if timeout_s == START_TIMEOUT_S:
                        raise
                    self._settle(key, error)
                    return
                timeout_s = ANSWER_TIMEOUT_S
                await self._store({key: answer})
                self._settle(key, answer)

    async def _has_query(self) -> bool:
        """Return whether a query is pending, or arrives within IDLE_S."""
        self._arrived.clear()
        if not self._pending:
            with suppress(TimeoutError):
                async with asyncio.timeout(IDLE_S):
                    await self._arrived.wait()
        return bool(self._pending)

    def _settle(self, key: str, answer: Answer | LookupFailed) -> None:
        _, future = self._pending.pop(key)
        if not future.done():
            future.set_result(answer)

    @asynccontextmanager
    async def _turn(self) -> AsyncGenerator[None]:
        """Wait until no other process runs a child, and settle what it found meanwhile.

        Without a folder in which processes could agree, do not wait.
        """
        with contextlib.ExitStack() as stack:
            lock = None
            with suppress(OSError):
                self._lock.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(self._lock.open("w"))
            while lock is not None and not _try_lock(lock) and self._pending:
                await asyncio.sleep(_POLL_INTERVAL_S)
                self._settle_stored()
            self._settle_stored()
            yield

    def _settle_stored(self) -> None:
        stored = self._load()
        for key in [key for key in self._pending if key in stored]:
            self._settle(key, stored[key])


def _try_lock(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@asynccontextmanager
async def _resolving_process(environment: dict[str, str]) -> AsyncGenerator[asyncio.subprocess.Process]:
    """Start the child, and kill it at the end whatever it is doing. Raises LookupFailed."""
    pipe = asyncio.subprocess.PIPE
    async with AsyncExitStack() as stack:
        try:
            child = await stack.enter_async_context(
                child_process(
                    sys.executable,
                    *COMMAND,
                    stdin=pipe,
                    stdout=pipe,
                    stderr=asyncio.subprocess.DEVNULL,
                    env=environment,
                    limit=MAX_ANSWER_BYTES,
                    start_new_session=True,  # Ctrl-C goes to this process alone, which then ends the child
                )
            )
        except OSError as error:
            raise LookupFailed(f"no process for it: {error}") from error
        yield child


async def _ask(child: asyncio.subprocess.Process, query: Mapping[str, Any], timeout_s: float) -> Any:
    """Return the child's answer to one query. Raises LookupFailed."""
    assert child.stdin is not None  # as it was started
    assert child.stdout is not None
    try:
        async with asyncio.timeout(timeout_s):
            child.stdin.write(json.dumps(query).encode() + b"\n")
            await child.stdin.drain()
            line = await child.stdout.readline()
    except TimeoutError:
        raise LookupFailed(f"litellm did not say within {timeout_s:g} s") from None
    except (OSError, ValueError) as error:
        raise LookupFailed(f"litellm did not say ({type(error).__name__})") from error
    if not line.endswith(b"\n"):
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                await child.wait()
        raise LookupFailed(f"its process ended before it said (exit code {child.returncode})")
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise LookupFailed("litellm said something else than was asked") from None


def params_for_litellm(names: Iterable[str]) -> list[str]:
    """Return the parameters for the provider that only litellm can do something with, sorted."""
    return sorted(set(names) - DIRECT_PARAMS)


# The child's side.


def resolve_with_litellm(litellm: Any, query: Mapping[str, Any], forward: Forward) -> ResolvedProvider:
    """Resolve a query with litellm's own tables. Raises NotResolved, and what litellm raises."""
    model, provider, _, base = litellm.get_llm_provider(
        query["model"], custom_llm_provider=query["custom_llm_provider"], api_base=query["api_base"]
    )
    if why := NOT_SERVED.get(provider):
        raise NotResolved(f"{provider} is not served, for {why}")
    compatible = provider in OPENAI_COMPATIBLE or provider in litellm.openai_compatible_providers
    address = query["api_base"]
    base = address or (base or DEFAULT_BASES.get(provider) if compatible else None)
    own = not address or is_own_address(address, provider, _default_base(litellm, query), os.environ)
    if forward == "translate" or not _is_direct(provider, base, query["stated"], forward):
        return ResolvedProvider("translate", model, provider, own_address=own and bool(address))
    key = _key_variable(litellm, model, provider) if own else None
    return ResolvedProvider("relay", model, provider, base, key, _param_aliases(litellm, model, provider), own)


def _default_base(litellm: Any, query: Mapping[str, Any]) -> str | None:
    base: str | None = litellm.get_llm_provider(query["model"], custom_llm_provider=query["custom_llm_provider"])[3]
    return base


def _is_direct(provider: str, base: str | None, stated: Collection[str], forward: Forward) -> bool:
    if forward == "relay":
        if not base:
            raise NotResolved(
                f"forward: relay needs api_base: {provider} has no address that is known to speak OpenAI's"
            )
        if needing := params_for_litellm(stated):
            raise NotResolved(f"forward: relay has no place for litellm_params.{needing[0]}; leave one of them out")
        return True
    if provider == "azure" and "/openai/v1" not in (base or ""):
        return False  # the older interface, with deployments and versions in the path
    return provider in OPENAI_COMPATIBLE and bool(base) and not params_for_litellm(stated)


def _key_variable(litellm: Any, model: str, provider: str) -> str | None:
    """Return where litellm would look for a key. It only says so while no key is in the environment."""
    missing: list[str] = litellm.validate_environment(f"{provider}/{model}")["missing_keys"]
    named = [name for name in missing if name.endswith("_API_KEY")]  # bedrock's are no keys of this kind
    return next((name for name in named if name.startswith(provider.upper())), named[0] if named else None)


def _param_aliases(litellm: Any, model: str, provider: str) -> dict[str, str]:
    """Return what the provider calls OpenAI's limits of output tokens."""
    import openai

    found = {}
    for name, other in (_TOKEN_LIMITS, _TOKEN_LIMITS[::-1]):
        with suppress(openai.OpenAIError):  # it knows no such field at all
            sent = litellm.get_optional_params(model=model, custom_llm_provider=provider, **{name: _PROBE_LIMIT})
            if sent.get(other) == _PROBE_LIMIT:
                found[name] = other
    return found


def answer_query(litellm: Any, query: dict[str, Any]) -> Answer:
    import openai

    try:
        return {"resolved": resolve_with_litellm(litellm, query, query["forward"]).to_json()}
    except NotResolved as error:
        return {"refused": str(error)}
    except (openai.OpenAIError, *LITELLM_NAME_ERRORS):
        return {"refused": f"no provider is known by its name {query['model'][:128]!r}"}


def limit_memory() -> None:
    """Let whatever litellm makes of a name end this process and not the machine."""
    with suppress(OSError, ValueError):  # less is allowed already, or this system knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


def main() -> None:
    limit_memory()
    out, sys.stdout = sys.stdout, sys.stderr  # litellm prints hints
    litellm = None
    for line in sys.stdin:
        litellm = litellm or import_litellm()
        print(json.dumps(answer_query(litellm, json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
