from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from openai.types import Completion
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming

from proxy.errors import BadRequest
from proxy.server.api.text_completions import TextCompletionsTranslation, translate
from proxy.server.api.translation import StreamTranslation, Translation
from proxy.upstream.sse import DONE

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
# What each field of OpenAI's SDK becomes in the chat body: a value for it, and the members that it leads to.
FIELDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "model": ("auto", {"model": "auto"}),
    "prompt": ("Once", {"messages": [{"role": "user", "content": "Once"}]}),
    "best_of": (1, {}),
    "echo": (False, {}),
    "frequency_penalty": (0.5, {"frequency_penalty": 0.5}),
    "logit_bias": ({"50256": -100}, {"logit_bias": {"50256": -100}}),
    "logprobs": (2, {"logprobs": True, "top_logprobs": 2}),
    "max_tokens": (7, {"max_tokens": 7}),
    "n": (1, {"n": 1}),
    "presence_penalty": (0.25, {"presence_penalty": 0.25}),
    "seed": (3, {"seed": 3}),
    "stop": (["\n"], {"stop": ["\n"]}),
    "stream": (True, {"stream": True}),
    "stream_options": ({"include_usage": True}, {"stream_options": {"include_usage": True}}),
    "suffix": ("", {}),
    "temperature": (0.1, {"temperature": 0.1}),
    "top_p": (0.9, {"top_p": 0.9}),
    "user": ("u1", {"user": "u1"}),
}


def a_translation(**document: Any) -> TextCompletionsTranslation:
    return translate({"model": "auto", "prompt": "Once", **document}, answer_id="1", created_at=1_700_000_000)


def refused(**document: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        a_translation(**document)
    return caught.value


def a_completion(*texts: str, **more: Any) -> dict[str, Any]:
    choices = [
        {"index": place, "message": {"role": "assistant", "content": text}, "finish_reason": "stop", **more}
        for place, text in enumerate(texts)
    ]
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": choices, "usage": USAGE}


def a_chunk(index: int = 0, finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {
        "object": "chat.completion.chunk",
        "choices": [{"index": index, "delta": delta, "finish_reason": finish_reason}],
    }


def logprobs_of(*tokens: str) -> dict[str, Any]:
    other = {"token": "other", "logprob": -2.0}
    return {"content": [{"token": token, "logprob": -0.5, "top_logprobs": [other]} for token in tokens]}


def events(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(event.removeprefix(b"data: ")) for event in data.split(b"\n\n") if event]


def streamed(chunks: Sequence[Mapping[str, Any]], **document: Any) -> list[Completion]:
    stream = a_translation(stream=True, **document).stream("small")
    data = b"".join(stream.write(chunk) for chunk in chunks) + stream.finish()
    assert data.endswith(DONE)
    return [Completion.construct(**event) for event in events(data.removesuffix(DONE))]  # as the client reads chunks


def test_every_field_of_the_official_client_is_accounted_for() -> None:
    known = {*CompletionCreateParamsNonStreaming.__annotations__, *CompletionCreateParamsStreaming.__annotations__}
    assert known == FIELDS.keys()


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_becomes_the_fields_of_a_chat_request_that_mean_the_same(name: str) -> None:
    value, expected = FIELDS[name]
    assert a_translation(**{name: value}).body == {
        "model": "auto",
        "messages": [{"role": "user", "content": "Once"}],
        **expected,
    }


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ("model", "prompt")])
def test_null_states_nothing(name: str) -> None:
    assert a_translation(**{name: None}).body == a_translation().body


def test_a_translation_is_what_the_server_serves() -> None:
    translation: Translation = a_translation()
    stream: StreamTranslation = translation.stream("small")
    assert (translation.api, translation.stored, stream.answer) == ("completions", False, None)


def test_the_fields_of_routing_stay_in_the_body_and_leave_the_document() -> None:
    own = {"uniroute": {"lambda": 0}, "models": ["a"], "provider": {"only": ["a"]}}
    translation = a_translation(metadata={"team": "x"}, top_k=5, **own)
    assert {**own, "metadata": {"team": "x"}, "top_k": 5}.items() <= translation.body.items()
    assert translation.document == {"model": "auto", "prompt": "Once", "metadata": {"team": "x"}, "top_k": 5}


def test_a_list_with_one_prompt_is_that_prompt() -> None:
    assert a_translation(prompt=["Once"]).body == a_translation().body


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (["a", "b"], "holds 2 prompts"),
        ([1, 2, 3], "must be text"),
        ([[1, 2], [3]], "must be text"),
        ([], "a list with one text"),
        (None, "a list with one text"),
        ([{"text": "a"}], "a list with one text"),
    ],
)
def test_other_prompts_are_refused_with_the_reason(prompt: Any, words: str) -> None:
    refusal = refused(prompt=prompt)
    assert (refusal.param, words in refusal.message) == ("prompt", True)


@pytest.mark.parametrize(
    "field",
    [
        {"echo": True},
        {"echo": 1},
        {"best_of": 3},
        {"best_of": True},
        {"best_of": 1, "n": 2},
        {"logprobs": True},
        {"logprobs": -1},
        {"logprobs": 21},
        {"suffix": 3},
        {"messages": []},
        {"stream_options": []},
    ],
)
def test_what_cannot_be_served_is_refused_by_its_name(field: dict[str, Any]) -> None:
    assert refused(**field).param == next(iter(field))


def test_several_answers_may_be_asked_for_without_a_choice_among_them() -> None:
    assert a_translation(n=3, best_of=3).body["n"] == 3


def test_a_suffix_is_told_to_the_model_in_the_users_message() -> None:
    (message,) = a_translation(prompt="def add(a, b):", suffix="print(add(1, 2))").body["messages"]
    assert message["role"] == "user"
    assert "<before>\ndef add(a, b):\n</before>" in message["content"]
    assert message["content"].endswith("<after>\nprint(add(1, 2))\n</after>")


def test_what_is_answered_in_chat_alone_is_left_out_and_named() -> None:
    translation = a_translation(tools=[{"type": "function"}], tool_choice="auto", functions=[])
    assert "tools" not in translation.body
    assert translation.left_out == ("tools", "tool_choice")


def test_an_answer_has_the_shape_that_the_official_client_reads() -> None:
    answer = a_translation(n=2).answer({**a_completion("a", "b"), "system_fingerprint": "fp"}, "small")
    read = Completion.model_validate(answer, strict=True)
    assert (read.id, read.created, read.model, read.system_fingerprint) == ("cmpl-1", 1_700_000_000, "small", "fp")
    assert [(choice.index, choice.text, choice.finish_reason) for choice in read.choices] == [
        (0, "a", "stop"),
        (1, "b", "stop"),
    ]
    assert read.usage is not None
    assert read.usage.total_tokens == 5


@pytest.mark.parametrize(
    ("reason", "legacy"),
    [
        ("stop", "stop"),
        ("length", "length"),
        ("content_filter", "content_filter"),
        ("tool_calls", "stop"),
        (None, "stop"),
    ],
)
def test_a_finish_reason_is_one_of_the_legacy_api(reason: str | None, legacy: str) -> None:
    answer = a_translation().answer(a_completion("a", finish_reason=reason), "small")
    assert answer["choices"][0]["finish_reason"] == legacy


@pytest.mark.parametrize(
    "message",
    [
        {"content": "no"},
        {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "no"}]},
        {"content": None, "refusal": "no"},
        {"content": "no", "reasoning_content": "hm"},
    ],
)
def test_the_text_is_what_the_model_says_in_whatever_form(message: dict[str, Any]) -> None:
    answer = a_translation().answer(a_completion("", message=message), "small")
    assert answer["choices"][0]["text"] == "no"


def test_log_probabilities_become_the_four_lists() -> None:
    answer = a_translation(logprobs=1).answer(a_completion("ab", logprobs=logprobs_of("a", "b")), "small")
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"other": -2.0, "a": -0.5}, {"other": -2.0, "b": -0.5}],
        "text_offset": [0, 1],
    }


def test_log_probabilities_that_nobody_asked_for_are_left_out() -> None:
    completion = a_completion("ab", logprobs=logprobs_of("a", "b"))
    assert a_translation().answer(completion, "small")["choices"][0]["logprobs"] is None
    assert a_translation(logprobs=0).answer(completion, "small")["choices"][0]["logprobs"]["top_logprobs"] is None


def test_a_stream_is_one_chunk_for_each_piece_and_keeps_the_choices_apart() -> None:
    chunks = [
        a_chunk(role="assistant", content=""),
        a_chunk(content="a"),
        a_chunk(1, content="b"),
        a_chunk(0, "length"),
    ]
    read = streamed(chunks)
    pieces = [(choice.index, choice.text, choice.finish_reason) for each in read for choice in each.choices]
    assert pieces == [(0, "a", None), (1, "b", None), (0, "", "length")]
    assert {each.id for each in read} == {"cmpl-1"}


def test_the_usage_of_a_stream_comes_last_and_only_if_it_was_asked_for() -> None:
    chunks = [a_chunk(content="a"), {**a_chunk(finish_reason="stop"), "usage": USAGE}]
    assert [each.usage for each in streamed(chunks)] == [None, None]
    asked = streamed(chunks, stream_options={"include_usage": True})
    assert [each.usage is None for each in asked] == [True, True, False]
    assert asked[-1].choices == []


def test_offsets_of_log_probabilities_go_on_from_chunk_to_chunk() -> None:
    chunks = [a_chunk(content="ab"), a_chunk(content="c")]
    for chunk, token in zip(chunks, ("ab", "c"), strict=True):
        chunk["choices"][0]["logprobs"] = logprobs_of(token)
    found = [each.choices[0].logprobs for each in streamed(chunks, logprobs=0)]
    assert [each.text_offset for each in found if each is not None] == [[0], [2]]


def test_a_stream_that_fails_ends_with_an_error_as_in_chat() -> None:
    error = {"message": "gone", "type": "upstream_error", "param": None, "code": None}
    assert events(a_translation(stream=True).stream("small").fail(error, 502)) == [{"error": error}]


def test_what_is_translated_is_not_changed() -> None:
    document = {"model": "auto", "prompt": ["Once"], "logprobs": 1, "uniroute": {"lambda": 0}}
    before = json.dumps(document)
    translate(document, answer_id="1", created_at=0)
    assert json.dumps(document) == before
