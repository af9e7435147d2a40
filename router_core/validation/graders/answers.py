from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from router_core.documents import parse_json
from router_core.text import normalize

# Longer answers are cut before grading, so that no answer can make a grader slow.
MAX_ANSWER_CHARS = 20_000


# A reply begins with its tool calls, one a line, each after this mark: `[tool call] {"name": …, "arguments": …}`.
_CALL = "[tool call] "

MAX_CALLS = 32

MAX_ARGUMENT_CHARS = 10_000


@dataclass(frozen=True)
class ToolCall:
    """A call that a model made."""

    name: str
    arguments: object
    """The JSON object, or what was sent where that is none."""

    @classmethod
    def received(cls, name: object, arguments: object) -> ToolCall:
        """Read the members of a call as a provider sends them. Without arguments it has an empty object."""
        if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
            arguments = {}
        return cls(name[:MAX_ARGUMENT_CHARS] if isinstance(name, str) else "", _parsed(arguments))


def _parsed(arguments: object) -> object:
    """Return the object that the arguments are or that their text states, else their text."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    text = text[:MAX_ARGUMENT_CHARS]
    try:
        value = parse_json(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def write_reply(text: str, calls: Iterable[ToolCall] = ()) -> str:
    """Write text and tool calls as one readable text, which `read_reply` reads.

    The calls come first, so that no cut of a long text loses them. A text cannot pass for calls.
    """
    lines = [_CALL + json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False) for call in calls]
    if not lines:
        return f"\n{text}" if text.startswith(_CALL) else text
    return "\n".join([*lines[:MAX_CALLS], f"\n{text}"] if text else lines[:MAX_CALLS])


def read_reply(reply: str) -> tuple[str, list[ToolCall]]:
    """Return the text of a reply and its tool calls. A call that cannot be read has no name."""
    calls: list[ToolCall] = []
    while len(calls) < MAX_CALLS and reply.startswith(_CALL):
        line, _, reply = reply.partition("\n")
        calls.append(_read_call(line.removeprefix(_CALL)))
    return (reply.removeprefix("\n") if calls else reply), calls


def _read_call(line: str) -> ToolCall:
    try:
        call = parse_json(line)
    except ValueError:
        call = None
    name = call.get("name") if isinstance(call, dict) else None
    return ToolCall(name, call.get("arguments")) if isinstance(name, str) else ToolCall("", line)


class Grader(Protocol):
    """Turns a reply into a score in [0, 1]; NaN if only a model could tell (JudgeGrader).

    A reply is a text, after its tool calls if it has any (`write_reply`). Graders of texts leave the calls out.
    """

    type: ClassVar[str]

    def grade(self, answer: str) -> float: ...

    def to_json(self) -> dict[str, object]:
        """Write the object that `parse_grader` reads."""


_THINK_ENDS = ("</think>", "</thinking>", "</reasoning>")

_THINK_STARTS = ("<think>", "<thinking>", "<reasoning>")

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*)?```", re.DOTALL)

_BOXED = re.compile(r"\\boxed\s*+\{((?:[^{}]|\{[^{}]{0,200}+\}){0,200}+)\}")

_BOLD = re.compile(r"\*\*([^*\n]{1,300}+)\*\*")

_QUOTED = re.compile(r"(?:(?<!\w)'|[\"“«「`])([^'\"“”«»「」`\n]{1,300}+)(?:'(?!\w)|[\"”»」`])")

# Blanks are matched possessively: three runs of them that give each other characters take cubic time.
_LEAD_IN = re.compile(
    r"(?:\banswers?|\bresults?|\boutputs?|\brespuesta|\bresultado|\bsalida|\bréponse|\brésultat|\bresposta|\bantwort"
    r"|\bergebnis|答案|结果|结论|输出|答え|正解|答)"
    r"[^\S\n]*+(?:correcta|correcte|correta|finale|final)?+[^\S\n]*+"
    r"(?:\([^)\n]{0,40}+\)|of [^\n:=.]{1,60}?|to [^\n:=.]{1,60}?)?[^\S\n]*+"
    r"(?:(?:is|are|was|would be|will be|should be|est|es|é|ist|lautet|是|为|は)\b[^\S\n]*+[:：]?|[:：=]|是|为|は)"
    r"[^\S\n]*+",
    re.IGNORECASE,
)

_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff"))


def strip_thinking(answer: str) -> str:
    """Return the reply's text without its thinking. If a thought never ends, only what comes before it is left."""
    text = read_reply(answer[:MAX_ANSWER_CHARS])[0].replace("\r\n", "\n")
    for mark in _THINK_ENDS:
        text = text.rpartition(mark)[2]
    for mark in _THINK_STARTS:
        text = text.partition(mark)[0]
    return text.translate(_INVISIBLE).strip()


def strip_markdown(text: str) -> str:
    """Turn full-width forms into ordinary ones, and remove emphasis marks and LaTeX delimiters."""
    text = _compatible(text).replace("−", "-").replace("’", "'")
    text = re.sub(r"\*\*|__|\\[(\[\])]|\\[,;!]", "", text)
    text = re.sub(r"\\[dt]?frac\{([^{}]{1,40})\}\{([^{}]{1,40})\}", r"\1/\2", text)
    return re.sub(r"\\(?:text|mathrm|mathbf)\{([^{}]{0,80})\}", r"\1", text)


def boxed_answers(text: str) -> str | None:
    """Return the content of the last \\boxed{…}."""
    found = _BOXED.findall(text)
    return found[-1] if found else None


def fenced_blocks(text: str) -> list[str]:
    """Return the contents of the ``` blocks, first to last."""
    return _FENCE.findall(text)


def bold_spans(text: str) -> list[str]:
    return _BOLD.findall(text)


def text_after_lead_in(text: str) -> str | None:
    """Return what follows the last "the answer is", "Answer:", "答案是", "la respuesta es", to the end of its line.

    If nothing follows ("Answer:" alone), the next line that is not blank is returned.
    """
    text = text.rstrip()
    ends = [end for match in _LEAD_IN.finditer(text) if (end := match.end()) < len(text)]
    return text[ends[-1] :].lstrip().partition("\n")[0].rstrip() if ends else None


def nonblank_lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def answer_candidates(answer: str) -> list[str]:
    """List the parts of the reply that could be the answer, as written; the whole reply comes first."""
    text = strip_thinking(answer)
    found = [
        text,
        *fenced_blocks(text)[-1:],
        *bold_spans(text)[-1:],
        *nonblank_lines(text)[:1],
        *nonblank_lines(text)[-1:],
    ]
    for part in (boxed_answers(text), text_after_lead_in(text), text_after_lead_in(strip_markdown(text))):
        if part is not None:
            found.append(part)
    return [*found, *_few_quoted(text)]


def _few_quoted(text: str) -> list[str]:
    """Return the first and the last quotation of a reply that has few, as "The reverse of 'abc' is 'cba'"."""
    quoted = _QUOTED.findall(text)
    return [quoted[0], quoted[-1]] if 0 < len(set(quoted)) <= 3 else []


def casefold(text: str) -> str:
    """Fold width, case, accents of Latin letters and runs of white space, for comparison."""
    text = _compatible(text).casefold().replace("’", "'")
    kept = "".join(letter for letter in normalize("NFKD", text) if not "\u0300" <= letter <= "\u036f")
    return " ".join(normalize("NFC", kept).split())


def _compatible(text: str) -> str:
    """Normalize to NFKC. One character can become eighteen, so the length is bounded again."""
    return normalize("NFKC", text)[:MAX_ANSWER_CHARS]


def trim(text: str) -> str:
    """Remove the quotes, emphasis and closing punctuation that people put around an answer."""
    return text.strip().strip("*`_\"'“”‘’«»「」『』【】 \t").rstrip(".。!！,;").strip("*`_\"'“”‘’«»「」『』 \t")
