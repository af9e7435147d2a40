from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from proxy.errors import BadRequest, PreviousResponseNotFound
from proxy.server.api.responses_request import translate
from proxy.server.stored_responses import expand, record_of
from proxy.settings.schema import Settings
from proxy.storage.redis import Store
from proxy.storage.response_store import ResponseStore
from tests.support.keyed_proxy import KeyedProxy, MadeKey
from tests.support.proxy_process import ProxyProcess, model_entry
from tests.support.responses_api import ID, completion, translated

NEXT_ID = "f" * 32
RESPONSE_ID = f"resp_{ID}"
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def a_store(store: Store) -> ResponseStore:
    return ResponseStore(
        store, 600, max_responses_per_key=10, max_response_bytes=100_000, max_stored_bytes_per_key=1_000_000
    )


def a_record(**fields: Any) -> dict[str, Any]:
    """Return a record of a turn in which the model has called a function."""
    asked = translated(**{"input": "What is the weather?", "instructions": "Be brief.", **fields})
    return record_of(asked, asked.answer(completion(content="Let me look.", tool_calls=[CALL]), "big"))


@pytest.fixture
async def responses(store: Store) -> ResponseStore:
    opened = a_store(store)
    await opened.save("key", RESPONSE_ID, a_record())
    return opened


async def test_a_conversation_is_continued_by_the_id_of_its_last_answer(responses: ResponseStore) -> None:
    result = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
    document = {"model": "auto", "previous_response_id": RESPONSE_ID, "input": [result]}
    expanded = await expand(document, responses, "key")
    found = translate(expanded, answer_id=NEXT_ID, created_at=1)
    assert [message["role"] for message in found.body["messages"]] == ["user", "assistant", "tool"]
    assert found.body["messages"][2]["content"] == "sunny"
    assert "previous_response_id" not in found.document
    assert found.answer(completion(content="x"), "big")["previous_response_id"] == RESPONSE_ID
    assert document["input"] == [result]


async def test_all_of_a_longer_conversation_is_in_its_last_record(responses: ResponseStore) -> None:
    document = {"previous_response_id": RESPONSE_ID, "input": "And tomorrow?", "model": "auto"}
    second = translate(await expand(document, responses, "key"), answer_id=NEXT_ID, created_at=1)
    answer = second.answer(completion(content="Rain."), "big")
    await responses.save("key", answer["id"], record_of(second, answer))
    await responses.delete("key", RESPONSE_ID)
    third = await expand({**document, "previous_response_id": answer["id"], "input": "Sure?"}, responses, "key")
    kinds = [item["type"] for item in third["input"]]
    assert kinds == ["message", "message", "function_call", "message", "message", "message"]


async def test_mistakes_are_counted_from_what_the_client_sent(responses: ResponseStore) -> None:
    document = {"model": "auto", "previous_response_id": RESPONSE_ID, "input": [{"role": "nobody", "content": ""}]}
    with pytest.raises(BadRequest) as caught:
        translate(await expand(document, responses, "key"), answer_id=NEXT_ID, created_at=1)
    assert caught.value.param == "input[0].role"


@pytest.mark.parametrize(("scope", "wanted"), [("other", RESPONSE_ID), ("key", "resp_0"), ("key", "../x"), ("key", 3)])
async def test_what_is_not_kept_for_this_key_cannot_be_continued(
    responses: ResponseStore, scope: str, wanted: Any
) -> None:
    with pytest.raises(PreviousResponseNotFound) as caught:
        await expand({"previous_response_id": wanted, "input": "x"}, responses, scope)
    assert caught.value.message == f"Previous response with id '{wanted}' not found."
    assert caught.value.param == "previous_response_id"


async def test_references_to_single_items_are_replaced_by_them(responses: ResponseStore) -> None:
    references = [{"type": "item_reference", "id": f"msg_{ID}_0"}, {"id": f"fc_{ID}_1"}]
    expanded = await expand({"input": ["hi", *references]}, responses, "key")
    assert [item["type"] for item in expanded["input"][1:]] == ["message", "function_call"]
    again = await expand({"previous_response_id": RESPONSE_ID, "input": references}, responses, "key")
    assert len(again["input"]) == 3


async def test_the_newest_response_holds_the_items_of_earlier_ones(responses: ResponseStore) -> None:
    document = {"previous_response_id": RESPONSE_ID, "input": "And tomorrow?", "model": "auto"}
    second = translate(await expand(document, responses, "key"), answer_id=NEXT_ID, created_at=1)
    answer = second.answer(completion(content="Rain."), "big")
    await responses.save("key", answer["id"], record_of(second, answer))
    await responses.delete("key", RESPONSE_ID)
    references = [{"type": "item_reference", "id": each} for each in (f"msg_{ID}_0", f"msg_{NEXT_ID}_0")]
    expanded = await expand({"input": references}, responses, "key")
    assert [item["content"][0]["text"] for item in expanded["input"]] == ["Let me look.", "Rain."]


async def test_an_item_is_put_in_once_however_often_it_is_referred_to(responses: ResponseStore) -> None:
    reference = {"type": "item_reference", "id": f"msg_{ID}_0"}
    with pytest.raises(BadRequest, match="is referred to twice") as caught:
        await expand({"input": [reference, {"role": "user", "content": "x"}, reference]}, responses, "key")
    assert caught.value.param == "input[2].id"


@pytest.mark.parametrize("wanted", [f"msg_{ID}_7", f"msg_{NEXT_ID}_0", "msg_1"])
async def test_a_reference_to_what_is_not_kept_is_a_mistake(responses: ResponseStore, wanted: str) -> None:
    with pytest.raises(BadRequest) as caught:
        await expand({"input": ["hi", {"type": "item_reference", "id": wanted}]}, responses, "key")
    assert caught.value.param == "input[1].id"


async def test_a_request_that_refers_to_nothing_is_left_as_it_is(responses: ResponseStore) -> None:
    for document in ({"input": "hi"}, {"input": [{"role": "user", "content": "hi"}]}, {"input": 3}, {}):
        assert await expand(document, responses, "key") is document


def test_secrets_of_tools_are_not_kept() -> None:
    secret = "sk-of-another-server"
    network = {"type": "allowlist", "domain_secrets": [{"domain": "a", "name": "b", "value": secret}]}
    tools = [
        {"type": "mcp", "server_label": "x", "authorization": secret, "headers": {"x-key": secret}},
        {"type": "shell", "environment": {"type": "container_auto", "network_policy": network}},
        {"type": "function", "name": "f", "parameters": {"properties": {"headers": {"type": "string"}}}},
    ]
    added = {"type": "additional_tools", "role": "developer", "tools": tools}
    record = a_record(tools=tools, input=[added, {"role": "user", "content": "hi"}])
    kept = json.dumps(record)

    assert secret not in kept
    for holder in (record["response"], record["input"][0]):
        assert (holder["tools"][0]["server_label"], holder["tools"][2]) == ("x", tools[2])


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, embedder_cache: Path) -> Iterator[KeyedProxy]:
    folder = tmp_path_factory.mktemp("responses")
    config = {
        "model_list": [model_entry("first", "http://127.0.0.1:9/v1")],
        "uniroute": {"profile": {"on_start": False}},
    }
    with ProxyProcess(folder, embedder_cache, config, {"MODEL_API_KEY": "sk-x"}) as proxy, KeyedProxy(proxy) as opened:
        yield opened


def a_key_with_a_response(keyed: KeyedProxy, **fields: Any) -> MadeKey:
    key = keyed.make()

    async def save() -> None:
        store = await Store.open(Settings(data_dir=keyed.proxy.folder))
        try:
            assert await a_store(store).save(key.id, RESPONSE_ID, a_record(**fields))
        finally:
            await store.close()

    asyncio.run(save())
    return key


def test_the_official_client_reads_and_deletes_a_response(keyed: KeyedProxy) -> None:
    client = keyed.client(a_key_with_a_response(keyed))
    found = client.responses.retrieve(RESPONSE_ID)
    assert (found.id, found.output_text) == (RESPONSE_ID, "Let me look.")
    client.responses.delete(RESPONSE_ID)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.retrieve(RESPONSE_ID)
    assert caught.value.code == "response_not_found"


def test_the_official_client_lists_what_was_asked(keyed: KeyedProxy) -> None:
    items = [{"role": "user", "content": f"{number}"} for number in range(3)]
    client = keyed.client(a_key_with_a_response(keyed, input=items))
    listed: list[Any] = list(client.responses.input_items.list(RESPONSE_ID, order="asc", limit=2))
    assert [item.content[0].text for item in listed] == ["0", "1", "2"]
    newest: Any = client.responses.input_items.list(RESPONSE_ID, limit=1).data[0]
    assert newest.content[0].text == "2"


def test_another_key_finds_nothing(keyed: KeyedProxy) -> None:
    a_key_with_a_response(keyed)
    other = keyed.make()
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/input_items")):
        reply = keyed.call(other, method, f"/v1/responses/{RESPONSE_ID}{path}")
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "response_not_found")
    assert keyed.call(None, "GET", f"/v1/responses/{RESPONSE_ID}").status_code == 401


def test_a_wrong_page_is_a_mistake_of_the_client(keyed: KeyedProxy) -> None:
    reply = keyed.call(a_key_with_a_response(keyed), "GET", f"/v1/responses/{RESPONSE_ID}/input_items?limit=0")
    assert reply.status_code == 400


def test_the_official_client_counts_the_tokens_of_a_request_and_of_what_it_continues(keyed: KeyedProxy) -> None:
    client = keyed.client(a_key_with_a_response(keyed))
    alone = client.responses.input_tokens.count(model="auto", input="And tomorrow?")
    continued = client.responses.input_tokens.count(input="And tomorrow?", previous_response_id=RESPONSE_ID)
    assert alone.object == "response.input_tokens"
    assert continued.input_tokens > alone.input_tokens > 0


def test_what_cannot_be_counted_names_the_field(keyed: KeyedProxy) -> None:
    client = keyed.client(keyed.make())
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.input_tokens.count(input="x", conversation="conv_1")
    assert caught.value.param == "conversation"
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.input_tokens.count(input="x", model="")
    assert caught.value.param == "model"


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "OPTIONS", "PUT"])
def test_names_of_calls_are_no_ids_of_responses(keyed: KeyedProxy, method: str) -> None:
    key = keyed.make()
    counted = keyed.call(key, method, "/v1/responses/input_tokens")
    compacted = keyed.call(key, method, "/v1/responses/compact")

    assert (counted.status_code, counted.headers.get("allow")) == (405, "POST")
    assert (compacted.status_code, "allow" in compacted.headers) == (404, False)
    assert keyed.call(key, "GET", "/v1/responses/input_tokens_of_mine").json()["error"]["code"] == "response_not_found"


def test_a_compaction_is_refused_with_the_reason(keyed: KeyedProxy) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        keyed.client(keyed.make()).responses.compact(model="gpt-5", input="hi")
    assert caught.value.code == "unknown_path"
    assert "only the model that compacts a conversation can read the result" in str(caught.value)
