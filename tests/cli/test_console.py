from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from unicodedata import category

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.cli import console
from router_core.text import plain
from tests.support.command import ADMIN_KEY, environment, run_command

HOSTILE = "\x1b]0;owned\x07re\x1b[31md\x1b[2J\x9b5mb\u202elue\u2066\x7f\x00\r\x08 \u2028\x1b]8;;http://x\x1b\\link"


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("größe ✓ 模型", "größe ✓ 模型"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("a\x1b[1;31mred\x1b[0m b", "ared b"),
        ("\x1b]52;c;c2VjcmV0\x07kept", "kept"),
        ("\x1bPq#0\x1b\\kept\x9dtitle\x9ckept", "keptkept"),
        ("\x1b(0\x1b7kept\x1bc", "kept"),
        ("abc\u202edef\u2066\u200b\ufeff", "abcdef"),
        ("half \ud800 a character", "half  a character"),
        ("👩\u200d🔬 می\u200cخواهم", "👩\u200d🔬 می\u200cخواهم"),
        ("unended \x1b[", "unended "),
        (HOSTILE, "redblue link"),
    ],
)
def test_text_keeps_what_is_read_and_loses_what_a_terminal_obeys(text: str, printed: str) -> None:
    assert plain(text) == printed


def test_where_one_line_is_meant_none_is_added() -> None:
    assert plain("a\nb\tc\r", lines=False) == "a b c"


@given(st.text(alphabet=st.characters(), max_size=60))
def test_no_text_whatever_leaves_a_control_character(text: str) -> None:
    printed = plain(text)
    unseen = {letter for letter in printed if category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert unseen <= {*"\n\t\u200c\u200d"}
    assert plain(printed) == printed
    printed.encode()


def test_all_ways_to_print_go_through_it(capsys: pytest.CaptureFixture[str]) -> None:
    console.echo(HOSTILE)
    console.echo_err(HOSTILE)
    console.echo(HOSTILE, end="")
    console.table(["name", HOSTILE], [[HOSTILE, "a\nb"]], title=HOSTILE)
    with console.progress() as bars:
        bars.update(HOSTILE, 1, 1, HOSTILE)
    printed = "".join(capsys.readouterr())
    assert [letter for letter in printed if not letter.isprintable() and letter != "\n"] == []


def test_in_json_everything_is_kept_and_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    console.emit_json({"größe": HOSTILE + "\ud800"})
    printed = capsys.readouterr().out
    assert [letter for letter in printed if not letter.isprintable() and letter != "\n"] == []
    assert json.loads(printed) == {"größe": HOSTILE + "\ud800"}
    assert "größe" in printed


class Hostile(BaseHTTPRequestHandler):
    """Answer with control characters in every text."""

    def do_GET(self) -> None:
        card = {"model_name": HOSTILE, "state": HOSTILE, "price": {"source": HOSTILE}, "profile": None}
        found = self.path == "/admin/models"
        document: Any = {"models": [card]} if found else {"error": {"message": HOSTILE}}
        body = json.dumps(document).encode()
        self.send_response(200 if found else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hostile() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Hostile)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("arguments", [["models", "list"], ["models", "show", "nobody"], ["models", "list", "--json"]])
def test_a_command_shows_a_server_s_words_and_obeys_none(tmp_path: Path, hostile: str, arguments: list[str]) -> None:
    environ = environment(tmp_path, UNIROUTE_ADMIN_KEY=ADMIN_KEY)
    ended = run_command(*arguments, "--url", hostile, environ=environ)
    printed = ended.stdout + ended.stderr
    assert "link" in printed
    assert [letter for letter in printed if not letter.isprintable() and letter != "\n"] == []
