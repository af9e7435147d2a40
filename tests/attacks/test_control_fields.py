"""Check that each name that litellm acts on is one of OpenAI's fields, or is refused, or changes only the body."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import AsyncIterator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from proxy.errors import BadRequest, FieldNotAllowed, UpstreamError
from proxy.routing.chat_request import parse_chat
from proxy.settings.litellm_params import CHAT_FIELDS, is_control_field
from proxy.settings.model_config import ModelInfo
from proxy.settings.schema import Settings
from proxy.storage.records import ModelRecord
from proxy.upstream.litellm_client import LiteLLMClient
from proxy.upstream.litellm_transport import import_litellm
from tests.attacks.conftest import ASK
from tests.support.litellm_calls import open_litellm_client
from tests.support.scripted_answers import Step, error_body
from tests.support.scripted_upstream import ScriptedUpstream

KEY = "sk-of-the-provider"
# Read, set or passed on by ourselves.
OPENAIS_OTHER = {"model", "messages", "stream", "stream_options", "metadata", "prompt_cache_retention"}
# Plain words that servers of OpenAI's format may have a field by: passed on, where litellm would act on its own.
HARMLESS = (
    *("context_management", "id", "include_server_side_tool_invocations", "itpm", "order", "otpm", "rpm", "tags"),
    *("tpm", "ttl", "verbose", "weight"),
)
MODELS = ("openai/x", "mistral/x", "deepseek/x", "groq/x", "anthropic/claude-x", "cohere_chat/x")
pytestmark = pytest.mark.filterwarnings("ignore")
EVIL: Any = {
    "api_base": "http://127.0.0.1:9/evil", "base_url": "http://127.0.0.1:9/evil", "api_key": "evil", "timeout": 0.001,
    "extra_headers": {"x-evil": "1"}, "headers": {"x-evil": "1"}, "model": "evil", "custom_llm_provider": "ollama",
    "mock_response": "evil", "extra_body": {"evil": 1}, "type": "evil", "name": "evil", "stream": True,
}  # fmt: skip


@cache
def names_of_litellm() -> frozenset[str]:
    litellm = import_litellm()
    from litellm.constants import DEFAULT_CHAT_COMPLETION_PARAM_VALUES, OPENAI_CHAT_COMPLETION_PARAMS
    from litellm.litellm_core_utils.get_litellm_params import get_litellm_params
    from litellm.types.utils import all_litellm_params

    names = {*all_litellm_params, *OPENAI_CHAT_COMPLETION_PARAMS, *DEFAULT_CHAT_COMPLETION_PARAM_VALUES}
    for function in (litellm.completion, litellm.acompletion, get_litellm_params):
        parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
        names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return frozenset(names)


def test_every_name_of_the_installed_litellm_is_accounted_for() -> None:
    names = names_of_litellm()
    left = {name for name in names if not is_control_field(name)} - CHAT_FIELDS - OPENAIS_OTHER

    assert len(names) > 300
    assert left == set(HARMLESS)


def test_control_fields_are_refused_wherever_they_would_be_unpacked() -> None:
    for name in names_of_litellm():
        if is_control_field(name):
            for body in ({name: 1}, {name.upper(): 1}, {"extra_body": {name: 1}}, {"extra_body": {"a": [{name: 1}]}}):
                with pytest.raises(FieldNotAllowed):
                    parse_chat(json.dumps({"model": "auto", "messages": ASK, **body}).encode(), [])


def test_names_within_content_are_left_to_the_caller() -> None:
    """A tool may have an argument called api_base, a schema a property called timeout."""
    every = {name: {"type": "string"} for name in names_of_litellm()}
    schema = {"type": "object", "properties": every, "required": sorted(every)}
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "f", "arguments": json.dumps(dict.fromkeys(every, "x"))},
    }
    body: dict[str, Any] = {
        "messages": [*ASK, {"role": "assistant", "content": None, "tool_calls": [call], **dict.fromkeys(every, "x")}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
        "functions": [{"name": "f", "parameters": schema}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        "tool_choice": every,
        "guided_json": schema,
    }
    body["messages"][1] |= {"role": "assistant", "content": None}

    assert parse_chat(json.dumps({"model": "auto", **body}).encode(), []).body == {"model": "auto", **body}


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream() as started:
        started.always = Step(status=400, body=error_body("no", "invalid_request_error", None))
        yield started


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[LiteLLMClient]:
    async with open_litellm_client({"MODEL_API_KEY": KEY}, settings=Settings(data_dir=tmp_path)) as opened:
        yield opened


async def seen(client: LiteLLMClient, upstream: ScriptedUpstream, model: str, **body: Any) -> list[tuple[Any, ...]]:
    """Return path, key, header names and body of everything that reaches the upstream."""
    upstream.history.clear()
    params = {"model": model, "api_base": upstream.url, "api_key": "os.environ/MODEL_API_KEY"}
    record = ModelRecord("m", params, ModelInfo(), "config", 0.0)
    with contextlib.suppress(UpstreamError):  # it refuses all, for its answers are in OpenAI's format alone
        await client.complete(record, {"model": "m", "messages": ASK, **body})
    return [(r.path, {n: v for n, v in r.headers.items() if n != "content-length"}, r.body) for r in upstream.history]


@pytest.mark.parametrize("model", MODELS)
async def test_harmless_fields_change_only_the_body(
    client: LiteLLMClient, upstream: ScriptedUpstream, model: str
) -> None:
    ((path, headers, body),) = await seen(client, upstream, model)
    for name in HARMLESS:
        for value in (7, EVIL):
            ((changed_path, changed_headers, changed),) = await seen(client, upstream, model, **{name: value})
            assert (changed_path, changed_headers) == (path, headers)
            assert {field: sent for field, sent in changed.items() if field not in (name, "extra_body")} == body
            assert changed.get(name, value) == value


@pytest.mark.parametrize("model", MODELS)
async def test_what_is_nested_in_a_field_of_openai_steers_nothing(
    client: LiteLLMClient, upstream: ScriptedUpstream, model: str
) -> None:
    ((path, headers, body),) = await seen(client, upstream, model)
    for name in sorted(CHAT_FIELDS | {"metadata", "prompt_cache_retention"}):
        for value in (EVIL, [EVIL]):
            for changed_path, changed_headers, changed in await seen(client, upstream, model, **{name: value}):
                assert changed_path == path, name
                assert {n: changed_headers.get(n) for n in headers} == headers, name
                assert "x-evil" not in changed_headers, name
                assert changed.get("model") == body["model"], name


@pytest.mark.parametrize(
    "model", ["anthropic/claude-3-5-sonnet-20241022", "gemini/gemini-1.5-pro", "ollama/llava", "mistral/x", "openai/x",
            "bedrock/anthropic.claude-3-sonnet-20240229-v1:0"],
)  # fmt: skip
async def test_media_by_address_is_not_fetched_from_inside(
    client: LiteLLMClient, upstream: ScriptedUpstream, model: str
) -> None:
    """Some formats carry media within, and litellm fetches them: the caller must not reach our network by it."""
    with ScriptedUpstream() as inside:
        inside.always = Step(status=200, headers={"content-type": "image/png"}, body=b"\x89PNG")
        for address in (
            f"{inside.url}/a.png",
            f"http://localhost:{inside.port}/a.png",
            f"http://0x7f.1:{inside.port}/",
        ):
            for part in (
                {"type": "image_url", "image_url": {"url": address}},
                {"type": "file", "file": {"file_id": address}},
                {"type": "input_audio", "input_audio": {"data": address, "format": "wav"}},
            ):
                content = [{"type": "text", "text": "hi"}, part]
                await seen(client, upstream, model, messages=[{"role": "user", "content": content}])
        assert inside.history == []


@pytest.mark.parametrize(
    "name",
    ["Model", "MODEL", "ｍodel", "me\u017f\u017fages", "Messages", "STREAM", "max\u200b_tokens",
     "\ufeffmodel", "model ", "UniRoute", "to\u200bols", "Extra_Body", "EXTRA_BODY", "Metadata"],
)  # fmt: skip
def test_a_name_that_another_parser_takes_for_ours_is_refused(name: str) -> None:
    """Go reads "Model" as "model", and the later one wins: what was checked would not be what is served."""
    with pytest.raises(FieldNotAllowed):
        parse_chat(json.dumps({"model": "auto", "messages": ASK, name: "evil"}).encode(), [])


@pytest.mark.parametrize(
    "name",
    ["api\u200b_base", "ａpi_base", "api_ba\u017fe", "API_BASE", " api_base", "api_base\t", "\u2060api_key", "_any"],
)
def test_no_disguise_gets_a_control_field_through(name: str) -> None:
    for body in ({name: "evil"}, {"extra_body": {name: "evil"}}):
        with pytest.raises(FieldNotAllowed):
            parse_chat(json.dumps({"model": "auto", "messages": ASK, **body}).encode(), [])


@pytest.mark.parametrize("name", ["model", "messages", "stream", "Model", "extra_body", "stream_options"])
def test_extra_body_may_not_change_what_was_checked(name: str) -> None:
    with pytest.raises(FieldNotAllowed):
        parse_chat(json.dumps({"model": "auto", "messages": ASK, "extra_body": {name: "other"}}).encode(), [])


@pytest.mark.parametrize("where", [None, "metadata", "extra_body"])
def test_a_long_name_in_other_letters_is_refused_before_it_is_compared(where: str | None) -> None:
    name = "\ufdfa" * 1001
    fields = {where: {name: 1}} if where else {name: 1}
    with pytest.raises(BadRequest, match="longer than 1000 characters"):
        parse_chat(json.dumps({"model": "auto", "messages": ASK, **fields}).encode(), [])
