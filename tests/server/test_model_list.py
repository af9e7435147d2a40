from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from proxy.routing.cost_weight import RoutingMode
from proxy.routing.selection_context import alias_mode, claude_aliases
from proxy.server.model_list import widest
from proxy.settings.schema import Settings
from router_core.types import Capabilities
from tests.support.keyed_proxy import KeyedProxy
from tests.support.makers import a_record
from tests.support.proxy_process import ProxyProcess, model_entry
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.selections import a_state

ALIASES = ["auto", "uniroute/auto", "uniroute/best", "uniroute/cheap", "team"]
CLAUDE = ["claude-auto", "claude-best", "claude-cheap", "claude-team"]
# Without one of these, version 0.171.0 of Codex reads none of the list.
CODEX_REQUIRES = {
    *("slug", "display_name", "supported_reasoning_levels", "shell_type", "visibility", "supported_in_api"),
    *("priority", "support_verbosity", "truncation_policy", "experimental_supported_tools", "base_instructions"),
}


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[ProxyProcess]:
    with ScriptedUpstream() as upstream:
        able = {"supports_function_calling": True, "supports_vision": True, "supports_reasoning": True}
        window = {"max_input_tokens": 200_000, "max_output_tokens": 8000}
        cached = {"cache_read_input_token_cost": 1e-8}
        vectors = {"mode": "embedding", "input_cost_per_token": 2e-8, "max_input_tokens": 8191}
        config = {
            "model_list": [
                model_entry("small", upstream.url, price=1.5e-7, supports_vision=False, **cached),
                model_entry("large", upstream.url, price=1e-5, **able, **window),
                {**model_entry("vectors", upstream.url), "model_info": vectors},
                {**model_entry("unpriced", upstream.url), "model_info": {}},
            ],
            "uniroute": {"profile": {"on_start": False}, "route_names": ["auto", "team"]},
        }
        folder = tmp_path_factory.mktemp("listed")
        with ProxyProcess(folder, embedder_cache, config, {"MODEL_API_KEY": "sk-x"}) as opened:
            opened.put_profile("small", 0.3)
            opened.put_profile("large", 0.1)
            yield opened


@pytest.fixture(scope="module")
def claude(proxy: ProxyProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=proxy.url, api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(proxy: ProxyProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


def listed(proxy: ProxyProcess, name: str = "") -> dict[str, Any]:
    return dict(httpx.get(f"{proxy.url}/v1/models{name}").json())


def test_the_official_client_of_openai_reads_every_name(client: openai.OpenAI) -> None:
    found = list(client.models.list())
    assert [model.id for model in found] == [*ALIASES, "large", "small", "unpriced", "vectors"]
    assert {model.object for model in found} == {"model"}
    assert client.models.retrieve("large").model_dump()["context_length"] == 200_000


def test_a_model_has_the_fields_that_openrouters_clients_read(proxy: ProxyProcess) -> None:
    large, small = listed(proxy, "/large"), listed(proxy, "/small")
    assert large["architecture"]["modality"] == "text+image->text"
    assert large["top_provider"] == {"context_length": 200_000, "max_completion_tokens": 8000, "is_moderated": False}
    assert {"tools", "tool_choice", "reasoning", "max_tokens"} <= set(large["supported_parameters"])
    assert small["pricing"] == {"prompt": "0.00000015", "completion": "0.0000006", "input_cache_read": "0.00000001"}
    assert small["architecture"]["input_modalities"] == ["text"]


def test_what_is_not_known_is_left_out(proxy: ProxyProcess) -> None:
    unpriced = listed(proxy, "/unpriced")
    assert not {"pricing", "context_length"} & unpriced.keys()
    assert unpriced["top_provider"]["max_completion_tokens"] is None


def test_a_name_that_routes_can_do_what_one_of_the_models_can_and_has_no_price(proxy: ProxyProcess) -> None:
    auto = listed(proxy, "/auto")
    assert (auto["context_length"], auto["architecture"]["input_modalities"]) == (200_000, ["text", "image"])
    assert "pricing" not in auto


def test_a_model_that_embeds_says_so_and_is_listed_for_openais_clients_alone(proxy: ProxyProcess) -> None:
    assert listed(proxy, "/vectors")["architecture"]["output_modalities"] == ["embeddings"]
    assert "vectors" not in [entry["slug"] for entry in listed(proxy)["models"]]
    headers = {"anthropic-version": "2023-06-01"}
    assert httpx.get(f"{proxy.url}/v1/models/vectors", headers=headers).status_code == 404


def test_codex_finds_what_it_has_no_default_for(proxy: ProxyProcess) -> None:
    entries = listed(proxy)["models"]
    assert [entry["slug"] for entry in entries] == [*ALIASES, "large", "small", "unpriced"]
    assert all(entry.keys() >= CODEX_REQUIRES and entry["base_instructions"] for entry in entries)
    (large,) = [entry for entry in entries if entry["slug"] == "large"]
    assert (large["context_window"], large["input_modalities"]) == (200_000, ["text", "image"])
    assert [level["effort"] for level in large["supported_reasoning_levels"]] == ["low", "medium", "high"]


def test_the_official_client_of_anthropic_reads_its_page(claude: anthropic.Anthropic) -> None:
    page = claude.models.list()
    assert [model.id for model in page.data] == [*CLAUDE, *ALIASES, "large", "small", "unpriced"]
    assert (page.has_more, page.first_id, page.last_id) == (False, "claude-auto", "unpriced")
    large = claude.models.retrieve("large")
    assert (large.type, large.max_input_tokens, large.max_tokens) == ("model", 200_000, 8000)
    assert claude.models.retrieve("claude-best").display_name == "UniRoute best"


@pytest.mark.parametrize("limit", [1, 5, 12])
def test_pages_hold_every_model_once_forwards_and_backwards(claude: anthropic.Anthropic, limit: int) -> None:
    whole = [model.id for model in claude.models.list(limit=1000).data]
    assert [model.id for model in claude.models.list(limit=limit)] == whole
    page = claude.models.list(limit=limit, before_id=whole[-1])
    pages: list[list[str]] = []
    while True:
        pages.insert(0, [model.id for model in page.data])
        if not page.has_more or page.first_id is None:
            break
        page = claude.models.list(limit=limit, before_id=page.first_id)
    assert [name for names in pages for name in names] == whole[:-1]


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "after_id=gone", "before_id=auto&after_id=auto"])
def test_a_page_that_cannot_be_is_refused(proxy: ProxyProcess, query: str) -> None:
    headers = {"anthropic-version": "2023-06-01"}
    assert httpx.get(f"{proxy.url}/v1/models?{query}", headers=headers).status_code == 400


def test_an_alias_for_claude_code_is_routed_as_what_it_stands_for(client: openai.OpenAI) -> None:
    ask: Any = [{"role": "user", "content": "What is 2 + 2?"}]
    answered = {name: client.chat.completions.create(model=name, messages=ask).model for name in CLAUDE}
    assert answered == {"claude-auto": "small", "claude-best": "large", "claude-cheap": "small", "claude-team": "small"}


def test_a_key_is_shown_what_it_may_use(keyed_proxy: KeyedProxy) -> None:
    key = keyed_proxy.make(models=["fair"], lambda_min=0.05)
    found = keyed_proxy.call(key, "GET", "/v1/models").json()
    assert [model["id"] for model in found["data"]] == ["auto", "uniroute/auto", "uniroute/cheap", "fair"]
    page = keyed_proxy.call(key, "GET", "/v1/models", None, **{"anthropic-version": "2023-06-01"}).json()
    assert "claude-best" not in [model["id"] for model in page["data"]]
    assert keyed_proxy.call(key, "GET", "/v1/models/claude-best").status_code == 404


def test_the_base_of_the_address_answers_without_a_key(keyed_proxy: KeyedProxy) -> None:
    assert keyed_proxy.call(None, "HEAD", "/").status_code == 200
    assert keyed_proxy.call(None, "GET", "/").json() == {"status": "ok"}


def test_every_name_that_routes_has_an_alias_and_none_twice() -> None:
    aliases = claude_aliases(["auto", "best", "claude-fast", "team/fast", "*"])
    assert list(aliases) == ["claude-auto", "claude-best", "claude-cheap", "claude-team/fast"]
    assert aliases["claude-best"] is RoutingMode.BEST


def test_a_registered_model_of_an_aliass_name_wins() -> None:
    free, settings = a_state(), Settings.model_validate({"data_dir": Path("/nowhere"), "route_names": ["*"]})
    taken = replace(free, models={**free.models, "claude-cheap": a_record("claude-cheap")})
    assert [alias_mode("claude-cheap", settings, each) for each in (free, taken)] == [RoutingMode.CHEAP, None]


def test_between_them_models_can_do_what_one_of_them_can() -> None:
    one = Capabilities(max_input_tokens=10, tools=True, vision=False)
    other = Capabilities(max_output_tokens=5, vision=False)
    assert widest([one, other]) == Capabilities(max_input_tokens=10, max_output_tokens=5, tools=True, vision=False)
    assert widest([]) == Capabilities()
