from __future__ import annotations

import base64
from typing import Any

import httpx
import pytest

from tests.attacks.conftest import ASK, Attacked

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(b"x" * 3000).decode()}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{"}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


ODD_ROLES: list[Any] = [None, 7, [], {}, "", "root", "developer", "function"]
SHAPES: dict[str, list[Any]] = {
    "no user turn": [{"role": "system", "content": "s"}],
    "null content": [user(None)],
    "no content": [{"role": "user"}],
    "empty": [user("")],
    "empty parts": [user([])],
    "an empty object": [{}],
    "only images": [user([IMAGE, IMAGE])],
    "ten thousand turns": [user("yes"), {"role": "assistant", "content": "no"}] * 5000,
    "many characters": [user("a" * 900_000)],
    "many lines": [user("\n" * 400_000)],
    "tool results": [*ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                     {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "4"}]}],
    "a tool result without its call": [{"role": "tool", "tool_call_id": "nobody", "content": "4"}],
    "unknown parts": [user([{"type": "hologram", "hologram": {"url": "x"}}, {"type": None}, {"type": ["text"]}, {}])],
    "parts that are no objects": [user([None, 1, "text", [["x"]], True])],
    "a part without its text": [user([{"type": "text"}, {"type": "text", "text": None}])],
    "a part with a list for a text": [user([{"type": "text", "text": [1]}])],
    "media of odd shapes": [user([{"type": "image_url"}, {"type": "image_url", "image_url": None},
                                  {"type": "image_url", "image_url": {"url": 7}},
                                  {"type": "input_audio", "input_audio": []},
                                  {"type": "file", "file": "x"}, {"type": "video_url", "video_url": {"url": []}}])],
    "zero width": [user("\u200b\u200c\u200d\u2060\ufeff" * 1000)],
    "right to left": [user("\u202e\u2066abc\u2069" * 100)],
    "controls": [user("\x00\x07\x1b[2J\x7f")],
    "line separators": [user("a\u2028b\u2029c\x85d\x0be\x0cf")],
    "combining": [user("a" + "\u0301" * 50_000)],
    "emoji": [user("👩‍👩‍👧‍👦🏳️‍🌈" * 2000)],
    "code": [user("def f(x):\n    return {x: [x for _ in range(10)]}\n" * 500)],
    "base64": [user(base64.b64encode(bytes(range(256)) * 1000).decode())],
    "one long word": [user("x" * 500_000)],
    "Chinese": [user("请用一句话解释量子纠缠。" * 2000)],
    "Thai and Arabic": [user("สวัสดีครับ مرحبا بالعالم" * 500)],
    "odd roles": [{"role": role, "content": "x"} for role in ODD_ROLES],
    "a template": [user("{{7*7}} ${jndi:ldap://x} %s %n {0.__class__} <script>alert(1)</script>")],
    "an event": [user("data: [DONE]\n\ndata: {}\n\n")],
    "special tokens": [user("<|endoftext|><|im_start|>system\n[INST]</s>" * 50)],
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_messages_of_any_shape_are_routed_and_reach_the_model_as_they_are(
    http: httpx.Client, attacked: Attacked, shape: str
) -> None:
    messages = SHAPES[shape]
    reply = http.post("/v1/chat/completions", json={"model": "auto", "messages": messages})
    requests = attacked.fair.history + attacked.good.history

    assert reply.status_code == 200, reply.text
    assert [received.body["messages"] for received in requests] == [messages]


@pytest.mark.parametrize(
    "messages", [None, [], {}, "hi", 7, [None], ["hi"], [["role", "user"]], [[]], [1], {"0": ASK[0]}]
)
def test_messages_that_are_no_list_of_objects_are_refused(
    http: httpx.Client, attacked: Attacked, messages: Any
) -> None:
    reply = http.post("/v1/chat/completions", json={"model": "auto", "messages": messages})

    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages")
    assert attacked.fair.history == attacked.good.history == []


def test_a_prompt_is_nowhere_in_the_log(http: httpx.Client, attacked: Attacked) -> None:
    http.post("/v1/chat/completions", json={"model": "auto", "messages": [user("canary-of-this-prompt")]})
    http.post(
        "/v1/chat/completions", json={"model": "auto", "messages": [user("canary-of-this-prompt")], "stream": "x"}
    )

    assert "canary-of-this-prompt" not in attacked.server.log
