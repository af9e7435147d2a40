from __future__ import annotations

import copy
import json
import re
from typing import Any, get_args

import pytest
from openai.types.responses.response_create_params import ResponseCreateParamsBase, ResponseCreateParamsNonStreaming
from openai.types.responses.response_input_item_param import ResponseInputItemParam

from proxy.errors import BadRequest
from proxy.routing.trajectory import read_trajectory
from proxy.server.api.responses_input import NO_RESULT
from proxy.server.api.responses_reasoning import encode_carried
from proxy.server.api.responses_request import KNOWN_FIELDS, translate
from proxy.server.api.responses_tools import MAX_NAME_CHARS
from tests.support.captured_requests import captured_body
from tests.support.responses_api import CAPTURED, CREATED_AT, ID, function, messages_of, translated

USER = {"role": "user", "content": "hi"}
BLOCK = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}


def a_call(call_id: str, name: str = "f", arguments: str = "{}", **more: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments, **more}


def a_result(call_id: str, output: Any = "done", **more: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output, **more}


def refusal(**fields: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        translated(**fields)
    return caught.value


def check_is_valid_chat(messages: list[dict[str, Any]]) -> None:
    """Check what chat servers refuse: a call without its result, and a result without its call."""
    expected: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            assert message["tool_call_id"] == expected.pop(0)
            continue
        assert expected == []
        expected = [call["id"] for call in message.get("tool_calls", ())]
        assert len(set(expected)) == len(expected)
        assert message["content"] or expected
    assert expected == []


@pytest.mark.parametrize("name", CAPTURED)
def test_what_clients_send_is_translated_and_each_field_accounted_for(name: str) -> None:
    body = captured_body(name)
    before = copy.deepcopy(body)
    found = translate(body, answer_id=ID, created_at=CREATED_AT)
    check_is_valid_chat(found.body["messages"])
    left_out = {path.partition("[")[0].partition(".")[0] for path in found.left_out}
    assert set(body) - left_out <= KNOWN_FIELDS
    assert body == before == found.document


def test_codex_keeps_its_tools_but_for_the_search_of_the_provider() -> None:
    found = translate(captured_body("codex-2-tool-result"), answer_id=ID, created_at=CREATED_AT)
    names = [tool["function"]["name"] for tool in found.body["tools"]]
    assert names == ["exec_command", "write_stdin", "request_user_input", "multi_agent_v1__close_agent"]
    assert found.left_out == ("client_metadata", "tools[4] (web_search)")
    assert not found.stored


def test_codex_history_becomes_one_system_message_and_one_turn() -> None:
    messages = translate(captured_body("codex-4-reasoning-carried"), answer_id=ID, created_at=CREATED_AT).body[
        "messages"
    ]
    assert [message["role"] for message in messages] == ["system", "user", "user", "assistant", "tool"]
    assert messages[3]["reasoning_content"] == "Thinking."
    assert messages[2]["content"][1]["image_url"]["detail"] == "high"


def test_every_field_of_the_official_type_is_accounted_for() -> None:
    stated = ResponseCreateParamsBase.__annotations__ | ResponseCreateParamsNonStreaming.__annotations__
    assert set(stated) - KNOWN_FIELDS == set()


# An example of each type of item, with what a model is told: roles, and the path that is left out.
ITEMS: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "message": ({"role": "user", "content": [{"type": "input_text", "text": "x"}]}, ["user"], ""),
    "file_search_call": (
        {"id": "fs", "status": "completed", "queries": ["q"], "results": [{"text": "found"}]},
        ["assistant", "tool"],
        "",
    ),
    "computer_call": ({"call_id": "c", "action": {"type": "screenshot"}}, ["assistant", "tool"], ""),
    "computer_call_output": (
        {"call_id": "c", "output": {"type": "computer_screenshot", "image_url": "data:image/png;base64,AA"}},
        ["assistant", "tool", "user"],
        "",
    ),
    "web_search_call": ({"id": "ws", "status": "completed", "action": {"type": "search"}}, [], "(web_search_call)"),
    "function_call": ({"call_id": "c", "name": "f", "arguments": "{}"}, ["assistant", "tool"], ""),
    "function_call_output": ({"call_id": "c", "output": "x"}, ["assistant", "tool"], ""),
    "tool_search_call": ({"arguments": {}}, [], "(tool_search_call)"),
    "tool_search_output": ({"tools": [function("g")]}, [], ""),
    "additional_tools": ({"role": "developer", "tools": [function("g")]}, [], ""),
    "reasoning": ({"id": "rs", "summary": [{"type": "summary_text", "text": "x"}]}, [], "(reasoning)"),
    "compaction": ({"encrypted_content": "x"}, [], "(compaction)"),
    "image_generation_call": ({"id": "ig", "result": "AA", "status": "completed"}, [], "(image_generation_call)"),
    "code_interpreter_call": (
        {"id": "ci", "code": "1+1", "container_id": "k", "outputs": [{"type": "logs", "logs": "2"}]},
        ["assistant", "tool"],
        "",
    ),
    "local_shell_call": ({"id": "l", "call_id": "c", "action": {"command": ["ls"]}}, ["assistant", "tool"], ""),
    "local_shell_call_output": ({"id": "c", "output": "x"}, ["assistant", "tool"], ""),
    "shell_call": ({"call_id": "c", "action": {"commands": ["ls"]}}, ["assistant", "tool"], ""),
    "shell_call_output": (
        {"call_id": "c", "output": [{"stdout": "x", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}}]},
        ["assistant", "tool"],
        "",
    ),
    "apply_patch_call": (
        {"call_id": "c", "status": "completed", "operation": {"type": "delete_file", "path": "a"}},
        ["assistant", "tool"],
        "",
    ),
    "apply_patch_call_output": ({"call_id": "c", "status": "failed", "output": "why"}, ["assistant", "tool"], ""),
    "mcp_list_tools": ({"id": "m", "server_label": "s", "tools": []}, [], "(mcp_list_tools)"),
    "mcp_approval_request": ({"id": "m", "name": "n", "arguments": "{}"}, [], "(mcp_approval_request)"),
    "mcp_approval_response": ({"approval_request_id": "m", "approve": True}, [], "(mcp_approval_response)"),
    "mcp_call": ({"id": "m", "name": "n", "arguments": "{}", "output": "x"}, ["assistant", "tool"], ""),
    "custom_tool_call_output": ({"call_id": "c", "output": "x"}, ["assistant", "tool"], ""),
    "custom_tool_call": ({"call_id": "c", "name": "n", "input": "x"}, ["assistant", "tool"], ""),
    "program": ({"id": "p", "call_id": "c", "code": "1", "fingerprint": "x"}, [], "(program)"),
    "program_output": ({"id": "p", "call_id": "c", "result": "1", "status": "completed"}, [], "(program_output)"),
}

# Items that ask for what is not offered.
REFUSED = {"item_reference", "compaction_trigger"}


def test_the_examples_have_every_type_of_item_that_the_official_types_have() -> None:
    items = get_args(ResponseInputItemParam)
    types = {kind for item in items for kind in re.findall(r"Literal\W+(\w+)", str(item.__annotations__.get("type")))}
    assert types == ITEMS.keys() | REFUSED


@pytest.mark.parametrize("kind", ITEMS)
def test_every_type_of_item_is_told_or_named_as_left_out(kind: str) -> None:
    item, roles, left_out = ITEMS[kind]
    found = translated(input=[USER, {"type": kind, **item}])
    check_is_valid_chat(found.body["messages"])
    assert [message["role"] for message in found.body["messages"][1:]] == roles
    assert found.left_out == ((f"input[1] {left_out}",) if left_out else ())


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_items_that_ask_for_what_is_not_kept_are_refused(kind: str) -> None:
    assert refusal(input=[USER, {"type": kind, "id": "msg_1"}]).param == "input[1]"


def test_a_turn_is_one_message_and_its_results_follow_directly() -> None:
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me look."}]}
    thought = {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "hm"}]}
    items = [
        USER,
        thought,
        said,
        a_call("a", arguments='{"x":1}'),
        a_call("b"),
        USER,
        a_result("b", "B"),
        a_result("a"),
    ]
    messages = messages_of(*items)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "user"]
    assert messages[1]["content"] == "Let me look."
    assert messages[1]["reasoning_content"] == "hm"
    assert [call["function"]["arguments"] for call in messages[1]["tool_calls"]] == ['{"x":1}', "{}"]
    assert [message["content"] for message in messages[2:4]] == ["done", "B"]


def test_calls_in_a_row_with_their_results_between_them_are_turns_of_their_own() -> None:
    messages = messages_of(USER, a_call("a"), a_result("a"), a_call("b"), a_result("b"))
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant", "tool"]


def test_a_call_without_a_result_gets_one_and_a_result_without_a_call_gets_that() -> None:
    messages = messages_of(USER, a_call("a"), USER, a_result("b", name="g"))
    check_is_valid_chat(messages)
    assert messages[2]["content"] == NO_RESULT
    assert messages[4]["tool_calls"][0]["function"] == {"name": "g", "arguments": "{}"}


def test_ids_that_servers_repeat_stay_with_their_own_results() -> None:
    messages = messages_of(USER, a_call("0"), a_result("0", "first"), a_call("0"), a_call("0"), a_result("0", "second"))
    check_is_valid_chat(messages)
    assert [message["content"] for message in messages if message["role"] == "tool"] == ["first", "second", NO_RESULT]


def shell_results(*outcomes: dict[str, Any], stdout: str = "x") -> list[dict[str, Any]]:
    output = [{"stdout": stdout, "stderr": "", "outcome": outcome} for outcome in outcomes]
    return [
        {"type": "shell_call", "call_id": "c", "action": {"commands": ["make"]}},
        {"type": "shell_call_output", "call_id": "c", "output": output},
    ]


def patch_results(status: str, diff: str = "-a\n+b") -> list[dict[str, Any]]:
    operation = {"type": "update_file", "path": "a.py", "diff": diff}
    return [
        {"type": "apply_patch_call", "call_id": "c", "operation": operation},
        {"type": "apply_patch_call_output", "call_id": "c", "status": status, "output": "x"},
    ]


EXITED, FAILED, TIMED_OUT = ({"type": "exit", "exit_code": 0}, {"type": "exit", "exit_code": 2}, {"type": "timeout"})


@pytest.mark.parametrize(
    ("items", "failed"),
    [
        (shell_results(EXITED), False),
        (shell_results(FAILED), True),
        (shell_results(TIMED_OUT), True),
        (shell_results(EXITED, FAILED), True),
        (shell_results({"type": "exit", "exit_code": 1}, stdout=""), False),  # a search that found nothing
        (patch_results("completed"), False),
        (patch_results("failed"), True),
        ([{"type": "mcp_call", "id": "m", "name": "n", "arguments": "{}", "output": "x"}], False),
        ([{"type": "mcp_call", "id": "m", "name": "n", "arguments": "{}", "error": "no such file"}], True),
    ],
)
def test_a_call_that_failed_is_told_so_that_the_run_is_seen_to_be_stuck(
    items: list[dict[str, Any]], failed: bool
) -> None:
    trajectory = read_trajectory(translated(input=[USER, *items]).body["messages"])
    assert (trajectory.turns, trajectory.failed > 0) == (1, failed)


def test_a_patch_that_is_taken_back_is_seen() -> None:
    items = [*patch_results("completed"), *patch_results("completed", diff="-b\n+a")]
    assert read_trajectory(translated(input=[USER, *items]).body["messages"]).reverted > 0


def test_pictures_of_a_result_follow_it_in_a_message_that_may_hold_some() -> None:
    picture = {"type": "input_image", "image_url": "data:image/png;base64,AA", "detail": "original"}
    messages = messages_of(USER, a_call("a"), a_result("a", [{"type": "input_text", "text": "see"}, picture]))
    assert messages[2]["content"].startswith("see\n\n(")
    assert messages[3] == {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": picture["image_url"], "detail": "high"}}],
    }


def test_signed_reasoning_comes_back_as_it_was() -> None:
    thought = {
        "type": "reasoning",
        "id": "rs",
        "summary": [],
        "encrypted_content": encode_carried({"thinking_blocks": [BLOCK]}),
    }
    found = translated(input=[USER, thought, a_call("a"), a_result("a")])
    assert found.body["messages"][1]["thinking_blocks"] == [BLOCK]
    assert found.left_out == ()


@pytest.mark.parametrize("text", ["gAAAA", "uniroute1.!!", "uniroute1.W10="])
def test_encrypted_reasoning_of_others_is_left_out(text: str) -> None:
    thought = {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": text}
    assert translated(input=[USER, thought, a_call("a")]).left_out == ("input[1].encrypted_content",)


def test_instructions_and_developer_messages_are_one_system_message() -> None:
    items = [{"role": "developer", "content": "b"}, {"role": "system", "content": "c"}, USER]
    messages = messages_of(*items, instructions="a")
    assert messages[0] == {"role": "system", "content": "a\n\nb\n\nc"}
    assert messages_of(USER, instructions=items[:2])[0] == {"role": "system", "content": "b\n\nc"}


def test_parts_of_each_type_are_told() -> None:
    parts = [
        {"type": "input_text", "text": "x"},
        {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AA"},
        {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
    ]
    content = messages_of({"role": "user", "content": parts})[0]["content"]
    assert [part["type"] for part in content] == ["text", "file", "input_audio"]
    said = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    assert messages_of(USER, said)[1] == {"role": "assistant", "content": "No."}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"input": 3}, "input"),
        ({"input": []}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"content": "x"}]}, "input[0].type"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [USER, {"role": "user", "content": [{"type": "video"}]}]}, "input[1].content[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].file_id",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "u"}]}]},
            "input[0].content[0].file_url",
        ),
        ({"input": [USER, {"type": "function_call", "name": "f"}]}, "input[1].call_id"),
        ({"input": [USER, {"type": "function_call", "call_id": "c"}]}, "input[1].name"),
        ({"tools": {}}, "tools"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function"}]}]}, "tools[0].tools[0].name"),
        ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [function("f")], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
        ({"tools": [function("f")], "tool_choice": "any"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"reasoning": "high"}, "reasoning"),
        ({"include": "x"}, "include"),
        ({"store": "no"}, "store"),
        ({"stream_options": 1}, "stream_options"),
    ],
)
def test_mistakes_are_named_as_the_client_wrote_them(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param


def test_fields_are_passed_under_the_names_of_a_chat() -> None:
    found = translated(
        max_output_tokens=9,
        temperature=0.5,
        top_logprobs=2,
        reasoning={"effort": "low", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}, "verbosity": "low"},
        metadata={"k": "v"},
        stream=True,
        uniroute={"lambda": 1},
    )
    assert found.body == {
        "uniroute": {"lambda": 1},
        "model": "auto",
        "stream": True,
        "metadata": {"k": "v"},
        "temperature": 0.5,
        "top_logprobs": 2,
        "messages": [USER],
        "verbosity": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": True}},
        "max_completion_tokens": 9,
        "reasoning_effort": "low",
        "logprobs": True,
        "stream_options": {"include_usage": True},
    }
    assert "uniroute" not in found.document
    assert found.stored


def test_what_no_chat_model_can_be_sent_is_named() -> None:
    found = translated(
        include=["file_search_call.results", "reasoning.encrypted_content"],
        truncation="auto",
        max_tool_calls=3,
        reasoning={"mode": "pro"},
        novelty=1,
        store=False,
        tools=[function("f", output_schema={}), {"type": "shell", "environment": {"type": "container_auto"}}],
    )
    assert set(found.left_out) == {
        *("include[0] (file_search_call.results)", "truncation", "max_tool_calls", "reasoning.mode", "novelty"),
        *("tools[0].output_schema", "tools[1] (shell)"),
    }


def test_nothing_of_tools_is_sent_where_none_is_left() -> None:
    found = translated(tools=[{"type": "web_search"}], tool_choice="auto", parallel_tool_calls=True)
    assert not {"tools", "tool_choice", "parallel_tool_calls"} & found.body.keys()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("none", "none"),
        ({"type": "function", "name": "f"}, "f"),
        ({"type": "custom", "name": "patch"}, "patch"),
        ({"type": "shell"}, "shell"),
        ({"type": "function", "name": "g", "namespace": "n"}, "n__g"),
        ({"type": "function", "name": "g"}, "n__g"),
    ],
)
def test_a_tool_may_be_chosen_in_every_form(choice: Any, expected: str) -> None:
    tools = [
        *(function("f"), {"type": "custom", "name": "patch"}, {"type": "shell"}),
        {"type": "namespace", "name": "n", "description": "N.", "tools": [function("g")]},
    ]
    chosen = translated(tools=tools, tool_choice=choice).body["tool_choice"]
    assert chosen == expected or chosen["function"]["name"] == expected


def test_allowed_tools_are_the_only_ones_offered() -> None:
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}
    body = translated(tools=[function("f"), function("g")], tool_choice=allowed).body
    assert [tool["function"]["name"] for tool in body["tools"]] == ["g"]
    assert body["tool_choice"] == "required"


def test_joined_names_are_short_and_never_those_of_other_tools() -> None:
    long = "x" * 60
    namespaces = [
        {
            "type": "namespace",
            "name": "n",
            "description": "",
            "tools": [function("g"), function("g.h"), function("g_h")],
        },
        {"type": "namespace", "name": long, "description": "", "tools": [function(f"{long}1"), function(f"{long}2")]},
    ]
    found = translated(tools=[*namespaces, function("n__g")])
    names = [tool["function"]["name"] for tool in found.body["tools"]]
    assert len(set(names)) == len(names) == 6
    assert max(map(len, names)) <= MAX_NAME_CHARS
    assert names[-1] == "n__g"


def test_a_free_form_tool_is_a_function_with_one_text() -> None:
    form = {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}
    tool = {"type": "custom", "name": "patch", "description": "Patch.", "format": form}
    called = {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": 'a "b"'}
    body = translated(tools=[tool], input=[USER, called]).body
    described = body["tools"][0]["function"]
    assert "start: /x/" in described["description"]
    assert list(described["parameters"]["properties"]) == ["input"]
    assert json.loads(body["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"input": 'a "b"'}


def test_tools_that_the_input_adds_are_offered() -> None:
    added = {"type": "additional_tools", "role": "developer", "tools": [function("g")]}
    assert [tool["function"]["name"] for tool in translated(input=[USER, added]).body["tools"]] == ["g"]


def test_reasoning_of_chat_models_is_not_sent_to_an_upstream_of_this_api() -> None:
    summary = [{"type": "summary_text", "text": "x"}]
    theirs = {"type": "reasoning", "id": "rs_68af", "summary": [], "encrypted_content": "gAAAA"}
    by_id = {"type": "reasoning", "id": f"rs_{ID}_0", "summary": summary}
    by_mark = {"type": "reasoning", "summary": summary, "encrypted_content": encode_carried({})}
    found = translated(input=[USER, theirs, by_id, by_mark, USER], previous_response_id="resp_1")
    assert found.document == {"model": "auto", "input": [USER, theirs, USER]}
    assert found.input == [USER, theirs, by_id, by_mark, USER]


def test_a_long_description_of_a_namespace_is_not_repeated_whole_for_each_member() -> None:
    members = [{"type": "function", "name": f"f{n}", "description": "Own.", "parameters": {}} for n in range(100)]
    namespace = {"type": "namespace", "name": "n", "description": "x" * 100_000, "tools": members}
    tools = translated(tools=[namespace]).body["tools"]

    assert len(tools) == 100
    assert all(len(tool["function"]["description"]) < 1100 for tool in tools)
    assert all(tool["function"]["description"].endswith("Own.") for tool in tools)
