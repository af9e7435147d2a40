from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from proxy.routing.agents import HARNESS_TEXTS, HOUSEKEEPING, HousekeepingRequest, find_housekeeping, own_words
from proxy.routing.requirements import routing_text
from proxy.server.api.client_apis import CLIENT_APIS
from tests.support.captured_requests import NAMES, read_captured

INTENTS = {
    "aider-1-first-turn": "Say hello",
    "claude-code-1-first-turn": "say hi",
    "claude-code-2-tool-result": "say hi",
    "claude-code-3-haiku-thinking-budget": "who? NOTOOL",
    "claude-code-4-thinking-carried": "say hi",
    "claude-code-5-local-command": "say hi\nand again",
    "codex-1-first-turn": "say hi",
    "codex-2-tool-result": "say hi",
    "codex-3-image-and-output-schema": "who",
    "codex-4-reasoning-carried": "who",
    "openai-agents-1-tools": "weather in paris?",
    "openai-agents-2-tool-result-stream": "weather?",
    "openai-agents-3-output-type": "who",
    "opencode-chat-2-tool-result": '"say hi"',
    "opencode-chat-3-file": '"NOTOOL read it"',
    "opencode-messages-2-tool-result": '"say hi"',
    "opencode-responses-2-tool-result": '"say hi"',
    "qwen-code-1-first-turn": "Say hello",
    "vercel-ai-responses-object": "who",
    "vercel-ai-responses-tool-result": "weather?",
}
ASKED_FOR_THEMSELVES = {"claude-code-6-compaction": "compaction", "opencode-chat-1-title": "title"}


def chat_body(name: str) -> dict[str, Any]:
    sent = read_captured(name)
    translate = CLIENT_APIS[sent.path.partition("?")[0]].translate
    return sent.body if translate is None else dict(translate(sent.body, answer_id="a" * 32, created_at=1).body)


def test_each_captured_request_says_what_is_taken_as_its_intent() -> None:
    assert sorted({**INTENTS, **ASKED_FOR_THEMSELVES}) == NAMES


@pytest.mark.parametrize("name", INTENTS)
def test_the_users_own_words_decide_of_a_captured_request(name: str) -> None:
    body = chat_body(name)

    assert routing_text(body["messages"]) == INTENTS[name]
    assert find_housekeeping(body) is None


@pytest.mark.parametrize("name", ASKED_FOR_THEMSELVES)
def test_captured_housekeeping_is_recognised(name: str) -> None:
    found = find_housekeeping(chat_body(name))

    assert found is not None
    assert found.task == ASKED_FOR_THEMSELVES[name]


ASK, ANSWER, AGAIN = {"role": "user", "content": "Fix it."}, {"role": "assistant", "content": "Done."}, "Write a test."
DETAILED = "Your task is to create a detailed summary of"
TOOLS = [{"type": "function", "function": {"name": "read", "parameters": {}}}]


def request_of(row: HousekeepingRequest) -> dict[str, Any]:
    text = f"{row.mark} and so on {row.also}"
    bodies: dict[str, dict[str, Any]] = {
        "system": {"messages": [{"role": "system", "content": text}, ASK]},
        "user": {"messages": [{"role": "user", "content": text}]},
        "turn": {"messages": [ASK, ANSWER, {"role": "user", "content": text}], "tools": TOOLS},
        "probe": {"messages": [{"role": "user", "content": row.mark}], "max_tokens": 1},
    }
    return bodies[row.place]


@pytest.mark.parametrize("row", HOUSEKEEPING, ids=lambda row: f"{row.client}: {row.mark[:30]}")
def test_every_row_of_the_table_is_recognised(row: HousekeepingRequest) -> None:
    found = find_housekeeping(request_of(row))

    assert found is not None
    assert (found.task, found.place) == (row.task, row.place)


@pytest.mark.parametrize("row", HOUSEKEEPING, ids=lambda row: f"{row.client}: {row.mark[:30]}")
def test_a_user_who_quotes_a_mark_is_served_as_ever(row: HousekeepingRequest) -> None:
    quoted = {"role": "user", "content": f"Explain this prompt:\n\n{row.mark} {row.also}"}
    system = {"role": "system", "content": f"You improve prompts such as: {row.mark} {row.also}"}

    assert find_housekeeping({"messages": [ASK, ANSWER, quoted]}) is None
    assert find_housekeeping({"messages": [system, ASK]}) is None


@pytest.mark.parametrize(
    "row", [row for row in HOUSEKEEPING if row.place in ("system", "turn")], ids=lambda row: row.mark[:30]
)
def test_a_mark_in_another_place_is_none(row: HousekeepingRequest) -> None:
    text = f"{row.mark} {row.also}"

    assert find_housekeeping({"messages": [{"role": "user", "content": text}]}) is None
    assert find_housekeeping({"messages": [{"role": "system", "content": text}, ASK], "tools": TOOLS}) is None


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "Generate a title for this essay: …"}]},
        {"messages": [{"role": "user", "content": "Generate a title for this conversation:\nA: Hi"}]},
        {"messages": [{"role": "system", "content": "You are a title generator."}, ASK]},
        {"messages": [ASK, ANSWER, {"role": "user", "content": "Summarize the conversation so far."}]},
        {"messages": [ASK, ANSWER, {"role": "user", "content": f"{DETAILED} the French Revolution."}]},
        {"messages": [{"role": "system", "content": f"{DETAILED} each article."}, ASK]},
        {"messages": [{"role": "user", "content": "### Task:\nGenerate a concise, 3-5 word title for my novel."}]},
        {"messages": [{"role": "user", "content": "Is 7 a prime? Answer Y or N."}], "max_tokens": 1, "logprobs": True},
        {"messages": [{"role": "user", "content": "test"}]},
        {"messages": [{"role": "system", "content": "Score."}, {"role": "user", "content": "test"}], "max_tokens": 1},
        {"messages": [{"role": "assistant", "content": "quota"}], "max_tokens": 1},
        {"messages": [{"role": 7, "content": {"text": "quota"}}], "max_tokens": 1},
    ],
)
def test_what_a_user_may_ask_is_no_housekeeping(body: dict[str, Any]) -> None:
    assert find_housekeeping(body) is None


def test_a_mark_is_found_in_any_text_of_the_newest_turn() -> None:
    parts = [
        {"type": "text", "text": "and again\n"},
        {
            "type": "text",
            "text": "\n[SUGGESTION MODE: Suggest what the user might naturally type next into Claude Code.]",
        },
    ]
    billing = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2"},
        {"type": "text", "text": "\nAnalyze if this message indicates a new conversation topic. If"},
    ]

    assert find_housekeeping({"messages": [ASK, ANSWER, {"role": "user", "content": parts}]}) is not None
    assert find_housekeeping({"messages": [{"role": "system", "content": billing}, ASK]}) is not None


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["<task>\nFix it.\n</task>", "<environment_details>\n# Time\n</environment_details>"], "Fix it."),
        (["<task>Fix it.</task>\n\n<environment_details>\n# Time\n</environment_details>"], "Fix it."),
        (["[read_file for 'a.py'] Result:", "print()", "<environment_details>…</environment_details>"], ""),
        (["[edit for 'a.py'] Result:\nDenied.\n<feedback>\nUse tabs.\n</feedback>\n", "<feedback>Now.</feedback>"],
         "Use tabs.\nNow."),
        (["[TASK RESUMPTION] This task was interrupted just now."], ""),
        ([f"{AGAIN}\n<system-reminder>\nPlan mode is on.\n</system-reminder>\n"], AGAIN),
        ([f"{AGAIN}\n<system-reminder>a</system-reminder>\n<system-reminder>b</system-reminder>"], AGAIN),
        (["<command-message>go</command-message>\n<command-name>/go</command-name>\n<command-args>PR 1</command-args>"],
         "PR 1"),
        ([f"Fix it.\n<system-reminder>\na\n</system-reminder>\n<ide_selection>b</ide_selection> \r\n{AGAIN}"],
         f"Fix it.\n{AGAIN}"),
        ([f"Why\n<skill>a</skill> here?\n{AGAIN}"], f"Why\n<skill>a</skill> here?\n{AGAIN}"),
        ([f"Why\n<skill>\n{AGAIN}"], f"Why\n<skill>\n{AGAIN}"),
        ([f"[Request interrupted by user for tool use]\n\n{AGAIN}"], AGAIN),
        ([f"# AGENTS.md instructions for /home\n\n<INSTRUCTIONS>\nUse tabs.\n</INSTRUCTIONS>\n\n{AGAIN}"], AGAIN),
        ([f'Called the Read tool with the following input: {{"filePath":"a"}}\n\n<path>a</path>\n<type>file</type>\n'
          f"<content>\n1: x\n</content>\n\n{AGAIN}"], AGAIN),
        ([f"{AGAIN}\n\n# File editing rules:\n\nReturn edits similar to unified diffs."], AGAIN),
        (["What is <skill>x</skill>"], "What is <skill>x</skill>"),
        (["[1] Result: 7"], "[1] Result: 7"),
        (["<INSTRUCTIONS>Use tabs.</INSTRUCTIONS>"], "<INSTRUCTIONS>Use tabs.</INSTRUCTIONS>"),
    ],
)  # fmt: skip
def test_the_words_of_the_user_are_left(texts: list[str], words: str) -> None:
    assert own_words(texts) == words


def test_examples_of_a_harness_are_no_earlier_turns() -> None:
    switched = "I switched to a new code base. Please don't consider the above files or try to edit them any longer."
    turns = [
        "Change get_factorial()",
        switched,
        "I am not sharing any files that you can edit yet.",
        "Say hello",
        "yes",
    ]

    assert routing_text([{"role": "user", "content": turn} for turn in turns]) == "Say hello\nyes"


def test_the_page_of_clients_shows_every_client_and_task_of_the_tables() -> None:
    page = (Path(__file__).parents[2] / "docs/clients.md").read_text("utf-8").partition("## What clients write")[2]
    shown = dict(re.findall(r"^\| ([^|`]+) \|[^|]*\|([^|]*)\|$", page, re.MULTILINE))
    clients = {text.client for text in HARNESS_TEXTS} | {row.client for row in HOUSEKEEPING}
    tasks = {client: {row.task for row in HOUSEKEEPING if row.client == client} for client in clients}

    assert {client: set(said.strip().split(", ")) - {""} for client, said in shown.items() if client in tasks} == tasks
