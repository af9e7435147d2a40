from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from proxy.cli.models import litellm_params_from
from router_core.kernels import compiled
from tests.support.command import environment, run_command
from tests.support.program import ROOT

HEAVY = ("torch", "litellm", "faiss", "numpy", "pydantic", "redis", "fastapi", "uvicorn", "openai", "httpx", "rich")


def one_line(completed: subprocess.CompletedProcess[str]) -> str:
    """Return the only line on stderr; a traceback would be many."""
    (line,) = completed.stderr.strip().splitlines()
    return line


def test_help_lists_the_commands_and_loads_nothing_heavy(tmp_path: Path) -> None:
    code = f"import sys, proxy.cli; print([name for name in {HEAVY} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]", loaded.stderr
    listed = run_command("--help", environ=environment(tmp_path)).stdout
    commands = ("serve", "demo", "worker", "models", "route", "validation", "fit", "prices", "keys")
    assert [name for name in commands if not re.search(rf"^ +{name} ", listed, re.MULTILINE)] == []


def test_the_version_is_that_of_the_installed_package_and_names_the_kernels(tmp_path: Path) -> None:
    ended = run_command("--version", environ=environment(tmp_path))
    built = compiled() is not None
    kernels = "compiled" if built else "NumPy, as none of this version were compiled"
    assert (ended.returncode, ended.stdout) == (0, f"uniroute {version('uniroute')} (routing kernels: {kernels})\n")
    without = run_command("--version", environ=environment(tmp_path) | {"UNIROUTE_COMPILED": "0"})
    assert without.stdout.endswith("(routing kernels: NumPy, as UNIROUTE_COMPILED says)\n") is built


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serve", "--port", "many"], "--port"),
        (["serve", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["serve", "--host", "0.0.0.0", "--port", "0"], "uniroute keys create"),
        (["nonsense"], "nonsense"),
        (["models", "list"], "UNIROUTE_ADMIN_KEY"),
        (["fit", "/nowhere.txt", "--out", "map"], "/nowhere.txt"),
        (["fit", "README.md", "--out", "/proc/map"], "/proc/map"),
        (["route", "hello", "--lambda", "inf"], "--lambda"),
        (["models", "add", "a", "--model", "openai/a", "--output-cost", "inf"], "--output-cost"),
        (["validation", "check", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["prices", "sync", "nowhere"], "http://"),
        (["keys", "create", " "], "NAME"),
        (["keys", "create", "bob", "--model", "a b"], "'a b'"),
    ],
)
def test_bad_arguments_end_with_status_2_and_say_which(tmp_path: Path, arguments: list[str], words: str) -> None:
    environ = environment(tmp_path)
    ended = run_command(*arguments, environ=environ)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_wrong_variable_ends_any_command_with_one_line(tmp_path: Path) -> None:
    ended = run_command("keys", "list", environ=environment(tmp_path, UNIROUTE_LAMBDA="much"))
    assert ended.returncode == 2
    assert "UNIROUTE_LAMBDA" in one_line(ended)
    assert "'much'" in one_line(ended)


def test_no_server_at_the_address_is_failed_work_in_one_line(tmp_path: Path) -> None:
    ended = run_command("route", "hello", "--url", "http://127.0.0.1:9", environ=environment(tmp_path))
    assert ended.returncode == 1
    assert "http://127.0.0.1:9" in one_line(ended)


def test_a_key_is_shown_once_listed_without_its_text_and_revoked(tmp_path: Path) -> None:
    environ = environment(tmp_path)
    secret = run_command("keys", "create", "bob", "--model", "small", environ=environ).stdout.strip()
    (key,) = json.loads(run_command("keys", "list", "--json", environ=environ).stdout)
    assert (key["name"], key["models"], key["revoked"]) == ("bob", ["small"], False)
    assert secret.startswith("ur-")
    assert secret not in json.dumps(key)
    assert run_command("keys", "revoke", key["id"], environ=environ).returncode == 0
    assert "revoked" in run_command("keys", "list", environ=environ).stdout
    unknown = run_command("keys", "revoke", "nobody", environ=environ)
    assert (unknown.returncode, "'nobody'" in one_line(unknown)) == (1, True)


def test_the_exported_validation_set_is_one_that_check_accepts(tmp_path: Path, embedder_cache: Path) -> None:
    environ = environment(tmp_path, embedder_cache)
    exported = tmp_path / "mine.jsonl"
    assert run_command("validation", "export", "--out", exported, environ=environ).returncode == 0
    checked = json.loads(run_command("validation", "check", exported, "--json", environ=environ).stdout)
    listed = json.loads(run_command("validation", "list", "--json", environ=environ).stdout)
    assert (checked["id"], checked["prompts"]) == (listed["id"], listed["prompts"])
    assert sum(family["prompts"] for family in listed["families"]) == listed["prompts"] >= 360


def test_check_warns_of_languages_of_the_traffic_that_the_set_has_no_prompt_in(
    tmp_path: Path, embedder_cache: Path
) -> None:
    environ = environment(tmp_path, embedder_cache)
    (tmp_path / "traffic.txt").write_text("What is it?\nWat is de hoofdstad van het land?\n")
    ended = run_command("validation", "check", "--traffic", tmp_path / "traffic.txt", environ=environ)
    asked = ("validation", "check", "--traffic", tmp_path / "traffic.txt", "--json")
    checked = json.loads(run_command(*asked, environ=environ).stdout)
    assert "warning: 50% of the traffic is in 'nl'" in one_line(ended)
    assert checked["unlabelled_languages"] == {"nl": 0.5}
    assert checked["languages"]["zh"] > 0


def test_a_broken_validation_line_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    good = {"id": "a", "family": "f", "prompt": "p", "grader": {"type": "exact", "answer": "1"}, "max_tokens": 9}
    broken.write_text(f"{json.dumps(good)}\n{{}}\n")
    ended = run_command("validation", "check", broken, environ=environment(tmp_path))
    assert ended.returncode == 1
    assert "line 2" in one_line(ended)


def test_fit_makes_the_same_map_of_the_same_prompts_and_refuses_to_overwrite(
    tmp_path: Path, embedder_cache: Path
) -> None:
    environ = environment(tmp_path, embedder_cache)
    (tmp_path / "a.txt").write_text("\n".join(f"add {n} and {n + 1}" for n in range(20)))
    rows = [{"messages": [{"role": "user", "content": f"write a poem about river {n}"}]} for n in range(20)]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    made = [
        json.loads(
            run_command(
                *("fit", tmp_path / "a.txt", tmp_path / "b.jsonl.gz", "--clusters", "4", "--json"),
                *("--out", tmp_path / folder),
                environ=environ,
            ).stdout
        )
        for folder in ("one", "two")
    ]
    assert made[0]["map"] == made[1]["map"]
    assert (made[0]["prompts"], made[0]["clusters"]) == (40, 4)
    again = run_command("fit", tmp_path / "a.txt", "--clusters", "4", "--out", tmp_path / "one", environ=environ)
    assert (again.returncode, "not an empty folder" in one_line(again)) == (2, True)


@pytest.mark.parametrize(("name", "hint"), [("no/such", "hf download no/such"), ("statik", "did you mean 'static'")])
def test_an_embedder_that_is_not_here_is_refused_before_anything_is_read(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree")
    arguments = ("fit", tmp_path / "a.txt", "--clusters", "2", "--embedder", name, "--out", tmp_path / "map")
    ended = run_command(*arguments, environ=environment(tmp_path), timeout_s=60)  # the hub was waited for 76 s
    assert (ended.returncode, hint in one_line(ended), (tmp_path / "map").exists()) == (2, True, False)


@pytest.mark.parametrize("arguments", [["--help"], ["keys", "list", "--json"]])
def test_output_that_cannot_be_written_is_one_line(tmp_path: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "proxy.cli", *arguments]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            command, env=environment(tmp_path), cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (ended.returncode, one_line(ended)) == (
        1,
        "uniroute: the output cannot be written: No space left on device",
    )


def test_a_word_that_json_has_no_number_for_stays_a_word() -> None:
    sent = litellm_params_from("openai/a", None, None, ["a=0.5", "b=NaN", "c=Infinity", "d=true"])
    assert (sent["a"], sent["b"], sent["c"], sent["d"]) == (0.5, "NaN", "Infinity", True)


def test_a_broken_line_of_prompts_is_named(tmp_path: Path) -> None:
    prompts = tmp_path / "a.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    ended = run_command("fit", prompts, "--out", tmp_path / "map", environ=environment(tmp_path))
    assert (ended.returncode, "line 2" in one_line(ended)) == (2, True)
