from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proxy.settings.schema import Settings
from proxy.storage.audit_log import CLI, AuditTrail
from proxy.storage.client_keys import SECRET
from proxy.storage.redis import Store
from tests.support.command import environment, run_command


def keys(folder: Path, *arguments: str) -> str:
    ended = run_command("keys", *arguments, environ=environment(folder))
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_what_is_stated_of_a_key_is_shown_and_can_be_changed_and_taken_away(tmp_path: Path) -> None:
    terms = ("--role", "viewer", "--expires-in", "30d", "--lambda", "0.2", "--lambda-min", "0.1", "--lambda-max", "1")
    limits = ("--requests-per-minute", "60", "--tokens-per-minute", "5000", "--usd-per-day", "1.5")
    made: dict[str, Any] = json.loads(
        keys(tmp_path, "create", "team", "--model", "a", "--model", "b/c", *terms, *limits, "--json")
    )
    secret = made.pop("key")
    assert SECRET.fullmatch(secret)
    assert json.loads(keys(tmp_path, "show", made["id"])) == made
    assert (made["role"], made["models"], made["lambda_default"], made["lambda_max"]) == (
        "viewer",
        ["a", "b/c"],
        0.2,
        1,
    )
    assert (made["requests_per_minute"], made["usd_per_day"], made["usd_per_month"]) == (60, 1.5, None)

    change = (
        "--usd-per-day",
        "none",
        "--lambda-max",
        "none",
        "--all-models",
        "--expires-in",
        "none",
        "--role",
        "admin",
    )
    changed = json.loads(keys(tmp_path, "update", made["id"], *change))
    assert changed == {
        **made,
        "usd_per_day": None,
        "lambda_max": None,
        "models": None,
        "expires_at": None,
        "role": "admin",
    }
    assert secret not in keys(tmp_path, "list", "--json")


def test_a_rotated_key_has_a_new_secret_and_the_trail_says_who_did_what(tmp_path: Path) -> None:
    first = json.loads(keys(tmp_path, "create", "team", "--json"))
    second = json.loads(keys(tmp_path, "rotate", first["id"], "--grace", "1h", "--json"))
    assert (second["id"], second["key"] == first["key"]) == (first["id"], False)
    assert second["previous_secret_until"] is not None
    assert SECRET.fullmatch(keys(tmp_path, "rotate", first["id"]).strip())
    keys(tmp_path, "update", first["id"], "--expires-in", "0s")
    assert "expired" in keys(tmp_path, "list")
    keys(tmp_path, "revoke", first["id"])
    assert "revoked" in keys(tmp_path, "list")
    refused = run_command("keys", "rotate", first["id"], environ=environment(tmp_path))
    assert (refused.returncode, "revoked for good" in refused.stderr) == (1, True)


async def test_what_the_command_line_writes_is_in_the_trail(tmp_path: Path) -> None:
    made = json.loads(keys(tmp_path, "create", "team", "--json"))
    keys(tmp_path, "revoke", made["id"])
    store = await Store.open(Settings(data_dir=tmp_path))
    try:
        seen = await AuditTrail(store, CLI).latest(9)
    finally:
        await store.close()
    assert [(line["who"], line["action"], line["target"]) for line in seen] == [
        ("cli", "keys.revoke", made["id"]),
        ("cli", "keys.create", made["id"]),
    ]
    assert made["key"] not in json.dumps(seen)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create", "bob", "--role", "boss"], "--role: `role` must be one of client, viewer, admin; got 'boss'"),
        (["create", "bob", "--lambda-min", "2", "--lambda-max", "1"], "--lambda-min: `lambda_min` is 2, above"),
        (["create", "bob", "--lambda", "much"], "--lambda: must be a number"),
        (["create", "bob", "--lambda-max", "nan"], "--lambda-max: "),
        (["create", "bob", "--requests-per-minute", "0"], "--requests-per-minute: "),
        (["create", "bob", "--usd-per-month", "-1"], "--usd-per-month: "),
        (["create", "bob", "--expires-in", "soon"], "--expires-in: must be a number and s, m, h, d or w"),
        (["create", "bob", "--expires-in", "0s"], "--expires-in: `expires_in_s` is in the past"),
        (["rotate", "k", "--grace", "60d"], "--grace: "),
        (["update", "k"], "nothing is stated"),
        (["update", "k", "--all-models", "--model", "a"], "--all-models: "),
    ],
)
def test_what_no_key_can_be_is_a_bad_argument_under_its_options_name(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    ended = run_command("keys", *arguments, environ=environment(tmp_path))
    assert (ended.returncode, words in ended.stderr) == (2, True), ended.stderr
    assert "Traceback" not in ended.stderr
