from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

from proxy.errors import ResponseTooLarge, UpstreamError
from proxy.upstream.client import UpstreamClient
from proxy.upstream.embeddings import EmbeddingsReader, EmbeddingsRequest, renamed, with_encoding
from proxy.upstream.payload import JSONPayload
from proxy.upstream.response_memory import ResponseBounds, ResponseMemory
from tests.support.makers import a_record
from tests.support.scripted_answers import Step
from tests.support.scripted_upstream import ScriptedUpstream

VECTOR = [0.5, -0.25, 2.0]
ENCODED = base64.b64encode(np.array(VECTOR, "<f4").tobytes()).decode()


def a_body(*vectors: Any, **more: Any) -> dict[str, Any]:
    data = [{"object": "embedding", "index": place, "embedding": vector} for place, vector in enumerate(vectors)]
    return {"object": "list", "data": data, "model": "theirs", "usage": {"prompt_tokens": 3, "total_tokens": 3}, **more}


def read(body: bytes, encoding: Any = "float", max_values: int = 1000) -> JSONPayload:
    reader = EmbeddingsReader("ours", ResponseBounds(ResponseMemory(), max_values), {})
    for start in range(0, len(body), 50_000):
        reader.feed(body[start : start + 50_000])
    return reader.embeddings(encoding)


@pytest.mark.parametrize("vector", [VECTOR, ENCODED])
@pytest.mark.parametrize(("encoding", "expected"), [("float", VECTOR), ("base64", ENCODED)])
def test_vectors_are_written_as_they_were_asked_for(vector: Any, encoding: Any, expected: Any) -> None:
    payload = with_encoding("ours", JSONPayload(a_body(vector)), encoding)
    assert payload.body["data"] == a_body(expected)["data"]


@pytest.mark.parametrize(
    "raw",
    [
        json.dumps(a_body(VECTOR, [1e-10], meta={"model": "theirs"})).encode(),
        json.dumps({"model": "theirs", **a_body([0.1], [0.2])}, indent=2).encode(),
        json.dumps({"usage": {"model": "theirs"}, **a_body(VECTOR)}).encode(),
    ],
)
def test_the_bytes_of_the_upstream_are_relayed_but_for_the_name(raw: bytes) -> None:
    sent = renamed(read(raw), "ours")
    assert json.loads(sent) == {**json.loads(raw), "model": "ours"}
    assert raw[raw.index(b"[") : raw.rindex(b"]")] in sent


def test_an_answer_without_a_name_gets_ours() -> None:
    body = a_body(VECTOR)
    del body["model"]
    assert json.loads(renamed(read(json.dumps(body).encode()), "ours")) == {**body, "model": "ours"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"data": []}',
        b'{"data": [{"embedding": null}]}',
        b'{"error": {"message": "no"}}',
    ],
)
def test_what_is_no_list_of_vectors_is_a_failure_of_the_model(body: bytes) -> None:
    with pytest.raises(UpstreamError, match="ours answered with success and no embeddings"):
        read(body)


def test_vectors_that_cannot_be_read_are_a_failure_of_the_model() -> None:
    for vector in ("not base64", "AAAA", ["a"], [[1.0], [2.0, 3.0]]):
        with pytest.raises(UpstreamError, match="cannot be read"):
            with_encoding("ours", JSONPayload(a_body(vector)), "float" if isinstance(vector, str) else "base64")


def test_more_numbers_than_are_read_are_refused_while_they_arrive() -> None:
    with pytest.raises(ResponseTooLarge):
        read(json.dumps(a_body([0.123456] * 20_000)).encode(), max_values=10_000)


# An answer in a provider's own format, and fields that litellm knows how to write there.
FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "cohere/embed-v4": (
        {"id": "x", "embeddings": {"float": [VECTOR]}, "texts": ["a"], "meta": {"billed_units": {"input_tokens": 3}}},
        {"input_type": "search_query"},
    ),
    "gemini/gemini-embedding-001": ({"embeddings": [{"values": VECTOR}]}, {"dimensions": 3}),
    "voyage/voyage-3": (a_body(VECTOR), {}),
    "ollama/nomic": ({"model": "nomic", "embeddings": [VECTOR], "prompt_eval_count": 5}, {}),
    "azure/te3": (a_body(VECTOR), {"dimensions": 3}),
}


@pytest.mark.parametrize("model", FORMATS)
async def test_other_formats_are_read_through_litellm(upstream: UpstreamClient, model: str) -> None:
    body, more = FORMATS[model]
    asked = EmbeddingsRequest({"model": "m", "input": ["a"], "user": "u1", **more}, None, "base64")
    with ScriptedUpstream() as server:
        server.always = Step(body=body)
        info = {"mode": "embedding", "forward": "translate", "free": True}
        record = a_record("m", info=info, model=model, api_base=server.url, api_key="sk-of-a-provider")
        found = await upstream.embed(record, asked, {})
    assert [each["embedding"] for each in found.body["data"]] == [ENCODED]
    assert found.body["usage"]["prompt_tokens"] > 0
