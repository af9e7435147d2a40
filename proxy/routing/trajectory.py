"""How an agent's run goes: whether its tools fail, its calls repeat, and its edits are taken back.

All of it is read from the messages of one request. What clients write of a failure is in tables, as they were seen to
write it, or as their own sources have it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from itertools import product
from typing import Any, Literal, NamedTuple

import orjson

from proxy.routing.agents import CLAUDE_CODE, CLINE, CODEX, OPENCODE, QWEN
from router_core.types import frozen

# The newest turns of a model that are looked at, and the messages among which they are looked for.
MAX_TURNS = 8
MAX_MESSAGES = 64

# Calls whose results are looked at: of one turn, and of all together.
MAX_CALLS = 3
MAX_RESULTS = 12

# Characters of a result that are looked at. Those of a failure stand first or last, whatever stands between.
HEAD_CHARS, END_CHARS = 240, 320

# Longer arguments are compared by their ends and their length, and are not read as an edit.
MAX_ARGUMENT_CHARS = 4096

# How much the newest turn counts; each one before counts KEPT times what the next one does.
RECENCY = 0.3
KEPT = 1.0 - RECENCY

# The share of failing turns that is usual in runs that succeed: a test that fails first, a file that is not there.
USUAL = 0.25

# What a repeated call, and an edit that takes back an earlier one, count beside a failed one.
REPEATED, REVERTED = 0.5, 0.5

ANY_CLIENT = "any"
OPENHANDS, AGENTS_SDK, MCP = "OpenHands", "OpenAI Agents SDK", "MCP"

Place = Literal["status", "head", "refusal", "tests", "end", "last"]


@frozen
class ResultMark:
    """A mark of what became of a tool call."""

    client: str
    place: Place
    """Where it stands, and what it says.

    status: this regular expression, at the start of a line near either end, is followed by an exit code
    head: the result begins so: the call failed
    refusal: the result begins so, or so behind "Error: ": the user did not want the call, which is no failure
    tests: this regular expression matches near the end, at the start of a line: tests failed, whatever the exit code is
    end: as tests, where no exit code is stated
    last: as end, in the last line
    """
    marks: tuple[str, ...]


RESULT_MARKS = (
    ResultMark(CLAUDE_CODE, "status", (r"Exit code ",)),
    ResultMark(CODEX, "status", (r"Process exited with code ", r"Exit code: ", r'.{0,2000}"exit_code": ?')),
    ResultMark(QWEN, "status", (r"Exit Code: ",)),
    ResultMark(CLINE, "status", (r"Command failed with exit code ", r"exit code: ")),
    ResultMark(OPENHANDS, "status", (
        r"\[(?:The )?[Cc]ommand (?:completed|finished) with exit code ",
        r"<returncode>",
    )),
    ResultMark(CLAUDE_CODE, "head", ("<tool_use_error>", "String to replace not found", "File has not been read yet")),
    ResultMark(CODEX, "head", (
        *("apply_patch verification failed", "execution error:", "exec_command failed", "failed to parse function"),
        *("unsupported call:", "patch rejected:", "failed in sandbox"),
    )),
    ResultMark(OPENCODE, "head", (
        *("File not found:", "oldString not found", "Model tried to call unavailable tool", "No changes to apply"),
        "The arguments provided to the tool are invalid",
    )),
    ResultMark(QWEN, "head", ("Failed to edit", "Error executing tool", "Tool execution failed", "Error during ")),
    ResultMark(CLINE, "head", ("The tool execution failed", "Missing value for required parameter")),
    ResultMark(AGENTS_SDK, "head", ("An error occurred while running the tool",)),
    ResultMark(MCP, "head", ("MCP error ", "Error executing tool ", "Error calling tool ", "Unknown tool")),
    ResultMark(ANY_CLIENT, "head", (
        *("Error:", "ERROR:", "error:", "Error\n", "Traceback (most recent call last):", "Command failed"),
        *("Invalid tool", "Failed to ", "Exception:", "fatal: "),
    )),
    ResultMark(CLAUDE_CODE, "refusal", (
        *("The user doesn't want to ", "The user doesn't want to proceed", "[Request interrupted by user"),
        *("Permission to use ", "Request interrupted", "Interrupted by user"),
    )),
    ResultMark(CODEX, "refusal", ("rejected by user", "exec command rejected by user", "aborted by user")),
    ResultMark(OPENCODE, "refusal", ("The user rejected permission", "The user dismissed", "Tool execution aborted")),
    ResultMark(QWEN, "refusal", ("[Operation Cancelled]", "Tool call cancelled by user", "User did not allow")),
    ResultMark(CLINE, "refusal", ("The user denied this operation", "User denied")),
    ResultMark(ANY_CLIENT, "tests", (
        r"(?:=+ )?(?:\d+ [a-z]+, )*[1-9]\d* (?:failed|errors?)\b.* in \d",  # pytest
        r"FAILED \((?:failures|errors)=",  # unittest
        r"\s*Tests:?\s+[1-9]\d* failed",  # jest, vitest
        r"\s+[1-9]\d* failing\b",  # mocha
        r"test result: FAILED",  # cargo
        r"(?:--- FAIL: |FAIL\s)",  # go
        r"\d+ examples?, [1-9]\d* failures?",  # rspec
        r"(?:\[ERROR\] +)?Tests run: \d+, Failures: (?:[1-9]|0, Errors: [1-9])",  # maven
        r"\d+% tests passed, [1-9]\d* tests? failed",  # ctest
    )),
    ResultMark(ANY_CLIENT, "end", (
        r"npm error ",
        r"error: could not compile",
        r"error(?:\[E\d+\])?: aborting due to",
        r"make(?:\[\d+\])?: \*\*\* ",
        r"Found [1-9]\d* errors?\b",  # tsc, ruff, mypy
        r"BUILD FAILED",
        r"\[INFO\] BUILD FAILURE",
    )),
    ResultMark(ANY_CLIENT, "last", (
        r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): ",  # of a traceback
        r"(?:/\S*/)?(?:ba|z|da)?sh: .*(?:not found|No such file or directory|Permission denied)\Z",
        r"fatal: ",
    )),
)  # fmt: skip

# Words without which no mark of the places "tests", "end" and "last" matches. That a result has none is quick to tell.
_WORDS = ("rror", "ail", "FAIL", "sh: ", "xception", "fatal: ")

# Tools that show what others have written: only the head of their results says how the call went.
READING_TOOLS = frozenset(
    {"read", "grep", "glob", "ls", "list", "search", "view", "webfetch", "websearch", "web_fetch", "web_search"}
    | {"read_file", "read_many_files", "list_directory", "list_files", "search_files", "search_file_content"}
    | {"grep_search", "glob_search", "notebookread", "view_image", "todowrite", "todo_write", "update_plan", "task"}
)

# Names of the fields of a tool's arguments: which file, what was there, what is there now.
EDIT_FIELDS = (
    ("file_path", "old_string", "new_string"),  # Claude Code, Qwen Code
    ("filePath", "oldString", "newString"),  # OpenCode
    ("path", "old_str", "new_str"),  # the text editor of Anthropic
)
# Which file, and all that is in it now.
WRITE_FIELDS = (("file_path", "content"), ("filePath", "content"), ("path", "content"), ("path", "file_text"))
# A text of lines that are taken out and put in.
PATCH_FIELDS = ("input", "patch", "patchText", "diff")
# The field that holds them in the patch tool of the Responses API.
OPERATION_FIELD = "operation"

EDITING_TOOLS = frozenset(
    {"edit", "write", "replace", "write_file", "create_file", "edit_file", "write_to_file", "apply_patch"}
    | {"str_replace_editor", "str_replace_based_edit_tool", "str_replace_based_edit", "str_replace"}
)


def _marks(place: Place) -> tuple[str, ...]:
    return tuple(mark for row in RESULT_MARKS if row.place == place for mark in row.marks)


# These are searched for in texts that begin with a line end. The first characters of the marks rule out most lines.
_STATUS = re.compile(rf"\n(?:{'|'.join(_marks('status'))})(-?\d+)")

_TESTS = re.compile(rf"\n(?=[-=\s\d\[tTF])(?:{'|'.join(_marks('tests'))})")

_END = re.compile(rf"\n(?=[nemFB\[])(?:{'|'.join(_marks('end'))})")

_LAST = re.compile("|".join(_marks("last")))

_HEADS = _marks("head")

_REFUSALS = tuple(text for mark in _marks("refusal") for text in (mark, f"Error: {mark}"))

# A JSON object that says so in its first field.
_JSON_FAILURE = re.compile(
    r'\{\s*"(?:(?:error|errors|is_error|isError)"\s*:(?!\s*(?:null|false|""|0\b|\[\s*\]|\{\s*\}))'
    r'|(?:status|success|ok)"\s*:\s*(?:"error"|"failed"|"failure"|false))'
)

# What stands between the head of a result and what the program has written.
_BEFORE_OUTPUT = "\nOutput:\n"

# 130: the user has stopped it.
_NO_FAILURES = frozenset({0, 130})


class Run(NamedTuple):
    """The turns of a model from one text of its user to the next."""

    place: int
    """Of the newest message with calls among all messages."""
    later: int
    """Texts of the user that came after it."""
    share: float
    """How much of what is stuck happened in it: the shares of all runs sum to one, or are all zero."""


@frozen
class Trajectory:
    """How a run of an agent goes, from 0 for well to 1. Newer turns count more."""

    stuck: float = 0.0
    """All of it together, beyond what is usual."""
    failed: float = 0.0
    """Results that say that the call failed."""
    repeated: float = 0.0
    """Calls that were made before, with the same outcome."""
    reverted: float = 0.0
    """Edits that take back an earlier one."""
    turns: int = 0
    """Turns with results that were looked at."""
    runs: tuple[Run, ...] = field(default=(), repr=False)
    """The newest first."""

    def to_json(self) -> dict[str, float] | None:
        """Return how it goes as decisions show it; None: there is no run to look at."""
        if not self.turns:
            return None
        return {name: getattr(self, name) for name in ("stuck", "failed", "repeated", "reverted", "turns")}


NO_TRAJECTORY = Trajectory()


class _Turn(NamedTuple):
    """A turn of a model whose calls have results."""

    place: int
    """Among all messages."""
    later: int
    """Texts of the user that came after it; the turns of one run have the same number."""
    calls: list[tuple[str, str, str]]
    """Of each call the name, the arguments and the result."""


class _Judgement(NamedTuple):
    """What is to be said against a call."""

    failed: bool
    repeated: bool
    """It was made before, with the same outcome."""
    reverted: bool
    """It takes back an earlier edit."""
    stuck: float
    """How stuck it shows the run to be, from 0 to 1."""


# By `failed`, `repeated` and `reverted`.
_JUDGEMENTS = {
    (failed, repeated, reverted): _Judgement(
        failed,
        repeated,
        reverted,
        stuck=1.0 - (1.0 - failed) * (1.0 - REPEATED * repeated) * (1.0 - REVERTED * reverted),
    )
    for failed, repeated, reverted in product((False, True), (False, True), (False, True))
}

_FINE = _JUDGEMENTS[False, False, False]


def read_trajectory(messages: Sequence[Any]) -> Trajectory:
    """Read how the run goes from the newest turns whose calls have results. Never fails."""
    turns = _newest_turns(messages)
    if not turns:
        return NO_TRAJECTORY
    failed = repeated = reverted = stuck = 0.0
    stuck_in_run: dict[int, float] = {}
    newest_of_run: dict[int, int] = {}
    weight = RECENCY
    for turn, judgements in _judged(turns):
        stuck_in_turn = 0.0
        share = weight / len(judgements)
        for call in judgements:
            if call is not _FINE:
                failed += share * call.failed
                repeated += share * call.repeated
                reverted += share * call.reverted
                stuck_in_turn += share * call.stuck
        stuck += stuck_in_turn
        stuck_in_run[turn.later] = stuck_in_run.get(turn.later, 0.0) + stuck_in_turn
        newest_of_run.setdefault(turn.later, turn.place)
        weight *= KEPT
    runs = tuple(Run(newest_of_run[later], later, part / (stuck or 1.0)) for later, part in stuck_in_run.items())
    beyond_usual = max(0.0, (stuck - USUAL) / (1.0 - USUAL))
    return Trajectory(beyond_usual, failed, repeated, reverted, len(turns), runs)


def _judged(turns: Sequence[_Turn]) -> list[tuple[_Turn, list[_Judgement]]]:
    """Judge the calls of each turn, given and returned the newest first. Turns that the user stopped are left out."""
    seen = _Seen()
    judged: list[tuple[_Turn, list[_Judgement]]] = []
    for turn in reversed(turns):  # each call is compared to those before it
        if judgements := [found for call in turn.calls if (found := seen.judge(*call)) is not None]:
            judged.append((turn, judgements))
    judged.reverse()
    return judged


def _newest_turns(messages: Sequence[Any]) -> list[_Turn]:
    """Return turns with calls that have results, the newest first."""
    turns: list[_Turn] = []
    results: dict[str, str] = {}
    later = looked_at = 0
    for place in range(len(messages) - 1, max(-1, len(messages) - 1 - MAX_MESSAGES), -1):
        message = messages[place]
        if not isinstance(message, dict):
            continue
        role = message.get("role")
        if role in ("tool", "function"):
            key = message.get("tool_call_id") if role == "tool" else message.get("name")
            if type(key) is str:
                results[key] = _text(message.get("content"))
        elif role == "assistant":
            if results:
                if calls := _answered(message, results):
                    turns.append(_Turn(place, later, calls))
                    looked_at += len(calls)
                    if len(turns) == MAX_TURNS or looked_at >= MAX_RESULTS:
                        break
                results = {}
        elif role == "user":
            later += 1
    return turns


def _answered(message: Mapping[str, Any], results: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return the calls of a turn that have results: name, arguments and result."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        old = message.get("function_call")
        calls = [{"id": old.get("name"), "function": old}] if isinstance(old, dict) else []
    found: list[tuple[str, str, str]] = []
    for call in calls[:MAX_CALLS]:
        if not isinstance(call, dict) or type(call_id := call.get("id")) is not str or call_id not in results:
            continue
        function = call.get("function")
        if isinstance(function, dict):
            name, arguments = function.get("name"), function.get("arguments")
            texts = name if type(name) is str else "", arguments if type(arguments) is str else ""
            found.append((*texts, results[call_id]))
    return found


def _text(content: Any) -> str:
    """Return a result's text, or its first and last ones if it has several."""
    if type(content) is str:
        return content
    if not isinstance(content, list):
        return ""
    ends = content if len(content) < 3 else (content[0], content[-1])
    texts = [part["text"] for part in ends if isinstance(part, dict) and type(part.get("text")) is str]
    return texts[0] if len(texts) == 1 else "\n".join(texts)


class _Seen:
    """What earlier turns did, to which each call is compared."""

    def __init__(self) -> None:
        self._outcomes: dict[tuple[object, ...], object] = {}
        self._edits: set[tuple[object, ...]] = set()
        # Of each file what was written, and what it holds now.
        self._written: dict[str, tuple[set[int], int]] = {}

    def judge(self, name: str, arguments: str, result: str) -> _Judgement | None:
        """Judge one call; None: its user stopped it."""
        tool = name.lower()
        failed = has_failed(result, reads=tool in READING_TOOLS)
        if failed is None:
            return None
        call = (tool, *_digest(arguments))
        outcome: object = True if failed else _outcome(result)
        repeated = self._outcomes.get(call) == outcome
        self._outcomes[call] = outcome
        reverted = not failed and tool in EDITING_TOOLS and self._takes_back(arguments)
        return _JUDGEMENTS[failed, repeated, reverted]

    def _takes_back(self, arguments: str) -> bool:
        """Note an edit, and return whether it is the reverse of an earlier one."""
        if len(arguments) > MAX_ARGUMENT_CHARS:
            return False
        try:
            fields = orjson.loads(arguments)
        except ValueError:
            fields = {PATCH_FIELDS[0]: arguments}  # a tool whose input is a text
        if not isinstance(fields, dict):
            return False
        if (edit := _edit_of(fields)) is not None:
            path, old, new = edit
            reverse = (path, new, old) in self._edits
            self._edits.add(edit)
            return reverse and old != new
        for path_field, content_field in WRITE_FIELDS:
            file, content = fields.get(path_field), fields.get(content_field)
            if type(file) is str and type(content) is str:
                before, now = self._written.get(file, (set(), 0))
                written = hash(content)
                self._written[file] = (before | {written}, written)
                return written in before and written != now
        return False


def _edit_of(fields: Mapping[str, Any]) -> tuple[str, object, object] | None:
    """Return which file an edit is of, what it takes out, and what it puts in."""
    if isinstance(operation := fields.get(OPERATION_FIELD), dict):
        fields = operation
    for path_field, old_field, new_field in EDIT_FIELDS:
        old, new = fields.get(old_field), fields.get(new_field)
        if type(old) is str and type(new) is str:
            return str(fields.get(path_field)), old, new
    for name in PATCH_FIELDS:
        if type(patch := fields.get(name)) is str:
            lines = patch.splitlines()
            return (
                "",
                tuple(line[1:] for line in lines if line[:1] == "-"),
                tuple(line[1:] for line in lines if line[:1] == "+"),
            )
    return None


def _digest(arguments: str) -> tuple[object, ...]:
    """Return what tells arguments apart, at a bounded cost."""
    if len(arguments) <= MAX_ARGUMENT_CHARS:
        return (arguments,)
    return arguments[:HEAD_CHARS], arguments[-HEAD_CHARS:], len(arguments)


def _outcome(result: str) -> tuple[object, ...]:
    """Return what tells results apart. What a client writes before a program's output differs by its time alone."""
    start = result.find(_BEFORE_OUTPUT, 0, HEAD_CHARS)
    start = 0 if start < 0 else start + len(_BEFORE_OUTPUT)
    return result[start : start + HEAD_CHARS], result[max(start, len(result) - END_CHARS) :], len(result) - start


def has_failed(result: str, *, reads: bool = False) -> bool | None:
    """Tell from its result whether a tool call failed; None: its user did not want it.

    Args:
        reads: the tool shows what others have written, so that what stands inside says nothing of the call.
    """
    head = f"{result[:HEAD_CHARS].lstrip()}\n"
    if head.startswith(_REFUSALS):
        return None
    code = None if reads else _exit_code(head, result)
    if code is None and (head.startswith(_HEADS) or (head[:1] == "{" and _JSON_FAILURE.match(head) is not None)):
        return True
    if code is not None and code not in _NO_FAILURES:
        # A search that finds nothing ends so.
        return code != 1 or not _is_silent(result)
    if reads:
        return False
    end = f"\n{result[-END_CHARS:]}"
    for word in _WORDS:
        if word in end:
            break
    else:
        return False
    if _TESTS.search(end) is not None:
        return True
    if code is not None:
        return False
    return _END.search(end) is not None or _LAST.match(end.rstrip().rpartition("\n")[2]) is not None


def mark_failed(result: str) -> str:
    """Return a result that a client's API states to have failed in words that say so by themselves."""
    if has_failed(result):
        return result
    return f"Error: {result}" if result else "Error"


def _exit_code(head: str, result: str) -> int | None:
    """Return the exit code that a result states; None: it states none."""
    for text in (head, result[-HEAD_CHARS:]) if len(result) > HEAD_CHARS else (head,):
        if ("code" in text or "Code" in text) and (found := _STATUS.search(f"\n{text}")) is not None:
            return int(found[1][:9])
    return None


def _is_silent(result: str) -> bool:
    """Whether a program has written nothing."""
    if len(result) > 2 * HEAD_CHARS:
        return False
    _, found, output = result.partition(_BEFORE_OUTPUT)
    return not (output if found else _STATUS.sub("", f"\n{result}")).strip()
