"""Whatever a client or a model sends: a body is translated or refused by name, and an answer is always one."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import BadRequest
from proxy.server.api.adaptation import adapt
from proxy.server.api.messages_request import MessagesTranslation, count_tokens, translate
from tests.server.api.messages import ID, TOOL, accumulated, check_order, streamed, translated
from tests.server.api.test_adaptation import GPT, HAIKU, LOCAL, OPUS

WORDS = st.sampled_from(
    """
    text image tool_use tool_result thinking redacted_thinking document search_result server_tool_use base64 url file
    content user assistant system a b enabled adaptive disabled any auto tool none custom json_schema high low object
    x-anthropic-billing-header: {"session_id":"s"}
    """.split()
)
NAMES = st.sampled_from(
    """
    type text role content source data media_type url id name input tool_use_id is_error cache_control signature
    thinking title context citations enabled budget_tokens effort format schema properties required user_id session_id
    description input_schema strict disable_parallel_tool_use
    """.split()
)
SCALARS = st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats(allow_nan=False) | WORDS | st.just("")
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=10
)
BLOCKS = st.fixed_dictionaries(
    {"type": WORDS}, optional={"text": VALUES, "content": VALUES, "source": VALUES}
) | st.one_of(
    st.fixed_dictionaries({"type": st.just("tool_use"), "id": WORDS, "name": WORDS, "input": st.just({})}),
    st.fixed_dictionaries({"type": st.just("tool_result"), "tool_use_id": WORDS, "content": VALUES}),
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": WORDS, "content": st.lists(BLOCKS, max_size=3) | VALUES}) | VALUES, max_size=4
)
DOCUMENTS = st.fixed_dictionaries(
    {"model": st.just("m") | VALUES, "max_tokens": st.just(5) | VALUES, "messages": MESSAGES | VALUES},
    optional=dict.fromkeys(
        """
        system tools tool_choice thinking output_config output_format metadata stop_sequences temperature top_k stream
        service_tier container thread uniroute
        """.split(),
        VALUES,
    ),
)


def translation_or_param(document: dict[str, Any]) -> tuple[MessagesTranslation | None, str | None]:
    try:
        return translate(document, answer_id=ID, created_at=1), None
    except BadRequest as error:
        return None, error.param


@given(DOCUMENTS)
@settings(deadline=None, max_examples=400)
def test_any_body_is_translated_or_refused_by_name(document: dict[str, Any]) -> None:
    before = copy.deepcopy(document)
    translation, param = translation_or_param(document)
    assert document == before
    if translation is None:
        assert param
        return
    assert count_tokens(document) >= 0
    body = copy.deepcopy(translation.body)
    for record in (OPUS, HAIKU, GPT, LOCAL):
        adapted, _ = adapt(translation.body, record)
        assert adapted.keys() <= translation.body.keys()
    assert translation.body == body


DELTAS = st.dictionaries(
    st.sampled_from(
        """
        role content reasoning_content reasoning reasoning_details thinking_blocks tool_calls function_call refusal
        """.split()
    ),
    VALUES
    | st.lists(
        st.dictionaries(NAMES | st.sampled_from(["index", "function", "arguments"]), VALUES, max_size=4), max_size=3
    ),
    max_size=4,
)
CHOICES = st.fixed_dictionaries(
    {},
    optional={"index": st.just(0) | VALUES, "delta": DELTAS | VALUES, "finish_reason": VALUES, "stop_reason": VALUES},
)
CHUNKS = st.fixed_dictionaries({}, optional={"choices": st.lists(CHOICES, max_size=2) | VALUES, "usage": VALUES})

ASKED = translated(tools=[TOOL], stop_sequences=["a"])


@given(st.lists(CHUNKS, max_size=5))
@settings(deadline=None, max_examples=400)
def test_any_chunks_make_a_stream_that_the_sdk_reads(chunks: list[dict[str, Any]]) -> None:
    before = copy.deepcopy(chunks)
    events = streamed(ASKED, chunks)
    assert chunks == before
    check_order(events)


@given(CHUNKS)
@settings(deadline=None, max_examples=300)
def test_any_completion_makes_a_message(completion: dict[str, Any]) -> None:
    message = ASKED.answer(completion, "m")
    assert message["type"] == "message"
    assert accumulated(streamed(ASKED, [completion])).id == message["id"]
