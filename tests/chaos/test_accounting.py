from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.accounting import Evidence, account
from tests.chaos.ledger import Attempt
from tests.chaos.outcomes import (
    COMPLETE,
    CUT,
    DROPPED,
    EMPTY,
    ERROR_EVENT,
    FOREIGN,
    HUNG,
    LEFT,
    MALFORMED,
    REFUSED,
    Outcome,
    Verdict,
    judge_body,
    judge_events,
    judge_part,
    judge_refusal,
)
from tests.chaos.questions import MODELS, Question, question_in
from tests.chaos.world import Logged

QUESTION = Question("q1-0000abcd", 8)
OTHER = Question("q2-0000abcd", 8)
TEXT = QUESTION.answer("alder")
SPEND = MODELS["alder"].spend_pico(QUESTION.usage("alder"))
ERROR = {"message": "it broke", "type": "upstream_error", "param": None, "code": "upstream_failed"}
KILL = 500.0


def a_record(decision: str, model: str = "alder", ending: str = "complete", cost: int | None = SPEND) -> dict[str, Any]:
    spent = None if cost is None else cost / 1e12
    return {"decision": decision, "model": model, "ending": ending, "cost_usd": spent, "at": 1.0}


def consistent_evidence() -> Evidence:
    """Build evidence of one answered question, and of one refused, whose model had died midway."""
    return Evidence(
        outcomes=[
            Outcome(QUESTION, "plain", Verdict(COMPLETE, model="alder"), 100.0, 101.0, 200, "dec-1"),
            Outcome(OTHER, "plain", Verdict(REFUSED), 100.0, 101.0, 502, "dec-2"),
        ],
        attempts=[
            Attempt("a", QUESTION.id, "alder", "answers", QUESTION.usage("alder"), whole=True),
            Attempt("b", OTHER.id, "birch", "dies midway", OTHER.usage("birch")),
        ],
        records=[a_record("dec-1"), a_record("dec-2", "birch", "failed", None)],
        logged=[
            Logged(QUESTION.id, "dec-1", "alder", "complete"),
            Logged(OTHER.id, "dec-2", "birch", "failed"),
        ],
        totals={
            "alder": {"requests": "1", "cost_usd": str((SPEND or 0) / 1e12)},
            "birch": {"requests": "1", "cost_unknown": "1"},
        },
    )


def without_the_first_record(evidence: Evidence) -> Evidence:
    return replace(evidence, records=evidence.records[1:])


def with_the_first_record_twice(evidence: Evidence) -> Evidence:
    return replace(evidence, records=[evidence.records[0], *evidence.records])


def with_another_cost(evidence: Evidence) -> Evidence:
    return replace(evidence, records=[a_record("dec-1", cost=(SPEND or 0) + 1), evidence.records[1]])


def with_an_expensive_failure(evidence: Evidence) -> Evidence:
    expensive = (MODELS["birch"].spend_pico(OTHER.usage("birch")) or 0) + 1
    return replace(evidence, records=[evidence.records[0], a_record("dec-2", "birch", "failed", expensive)])


def with_an_ending(ending: str) -> Callable[[Evidence], Evidence]:
    def changed(evidence: Evidence) -> Evidence:
        return replace(
            evidence, outcomes=[evidence.outcomes[0], replace(evidence.outcomes[1], verdict=Verdict(ending))]
        )

    return changed


def with_an_answer_that_was_cut_upstream(evidence: Evidence) -> Evidence:
    return replace(evidence, attempts=[replace(evidence.attempts[0], whole=False), evidence.attempts[1]])


def with_an_answer_of_which_nothing_is_known(evidence: Evidence) -> Evidence:
    return replace(evidence, attempts=[*evidence.attempts, replace(evidence.attempts[0], id="c", model="cedar")])


def with_other_totals(evidence: Evidence) -> Evidence:
    return replace(evidence, totals={**evidence.totals, "alder": {"requests": "1", "cost_usd": "1e-12"}})


def with_a_record_that_is_not_logged(evidence: Evidence) -> Evidence:
    return replace(evidence, logged=evidence.logged[:1])


def sent_twice(evidence: Evidence) -> Evidence:
    return replace(evidence, outcomes=[*evidence.outcomes, evidence.outcomes[1]])


def test_consistent_ledgers_have_no_discrepancy() -> None:
    found = account(consistent_evidence())

    assert found.problems == []
    assert found.complete_pico == found.ledger_pico == SPEND


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_the_first_record, "on record as complete: nothing"),
        (with_the_first_record_twice, "on record as complete: ['alder', 'alder']"),
        (with_the_first_record_twice, "is on record 2 times"),
        (with_another_cost, "picodollars on record"),
        (with_an_expensive_failure, "more than the whole answer's"),
        (with_an_ending(CUT), ": cut,"),
        (with_an_ending(HUNG), ": hung,"),
        (with_an_ending(DROPPED), "though no worker was killed"),
        (with_an_ending(EMPTY), "no upstream had said none"),
        (with_an_answer_that_was_cut_upstream, "no upstream gave it whole"),
        (with_an_answer_of_which_nothing_is_known, "nothing is on record of it"),
        (with_other_totals, "picodollars in the totals"),
        (with_a_record_that_is_not_logged, "is on record and not in the log"),
        (without_the_first_record, "is logged and not on record"),
        (sent_twice, "was asked 2 times"),
    ],
)
def test_each_discrepancy_is_found(spoil: Callable[[Evidence], Evidence], message: str) -> None:
    assert [problem for problem in account(spoil(consistent_evidence())).problems if message in problem]


def test_a_connection_may_drop_where_a_worker_was_killed_and_nowhere_else() -> None:
    evidence = with_an_ending(DROPPED)(consistent_evidence())

    assert account(replace(evidence, kills=[100.5])).problems == []
    assert account(replace(evidence, kills=[KILL])).problems != []


def stream(*texts: str, model: str = "alder", last: bytes = b"data: [DONE]") -> list[bytes]:
    chunks = [{"model": model, "choices": [{"delta": {"content": text}}]} for text in texts]
    return [*(b"data: " + json.dumps(chunk).encode() for chunk in chunks), *([last] if last else [])]


ERROR_LINE = b"data: " + json.dumps({"error": ERROR}).encode()


@pytest.mark.parametrize(
    ("events", "ending"),
    [
        (stream(TEXT[:20], TEXT[20:]), COMPLETE),
        ([b": keep-alive", *stream(TEXT)], COMPLETE),
        (stream(TEXT[:20]), CUT),
        (stream(TEXT, last=b""), CUT),
        ([], CUT),
        (stream(last=b"data: [DONE]"), EMPTY),
        (stream(OTHER.answer("alder")), FOREIGN),
        (stream(TEXT, model="birch"), FOREIGN),
        (stream(TEXT[:20], last=ERROR_LINE), ERROR_EVENT),
        (stream(OTHER.answer("alder")[:20], last=ERROR_LINE), FOREIGN),
        ([ERROR_LINE, b"data: [DONE]"], MALFORMED),
        ([*stream(TEXT), b"data: [DONE]"], MALFORMED),
        ([b"data: {half", *stream(TEXT)], MALFORMED),
    ],
)
def test_a_stream_is_complete_only_where_it_is_whole_and_says_so(events: list[bytes], ending: str) -> None:
    assert judge_events(QUESTION, events).ending == ending


@pytest.mark.parametrize(
    ("text", "finish_reason", "ending"),
    [
        (TEXT, "stop", COMPLETE),
        (TEXT[:-1], "stop", CUT),
        (TEXT, "length", MALFORMED),
        (OTHER.answer("alder"), "stop", FOREIGN),
    ],
)
def test_a_body_is_complete_only_where_it_is_whole(text: str, finish_reason: str, ending: str) -> None:
    body = {"model": "alder", "choices": [{"message": {"content": text}, "finish_reason": finish_reason}]}

    assert judge_body(QUESTION, body).ending == ending


@pytest.mark.parametrize(
    ("status", "headers", "body", "ending"),
    [
        (502, {}, {"error": ERROR}, REFUSED),
        (429, {"retry-after": "1"}, {"error": ERROR}, REFUSED),
        (429, {}, {"error": ERROR}, MALFORMED),
        (401, {}, {"error": ERROR}, MALFORMED),
        (502, {}, {"error": "it broke"}, MALFORMED),
        (502, {}, {"error": {**ERROR, "code": 502}}, MALFORMED),
        (502, {}, b"<html>", MALFORMED),
    ],
)
def test_a_failure_is_clear_only_in_the_form_that_clients_know(
    status: int, headers: dict[str, str], body: object, ending: str
) -> None:
    assert judge_refusal(status, headers, body).ending == ending


@pytest.mark.parametrize("length", range(0, len(TEXT), 3))
def test_a_client_that_disconnected_had_read_a_part_of_the_answer(length: int) -> None:
    assert judge_part(QUESTION, TEXT[:length]).ending == LEFT
    assert length < 4 or judge_part(OTHER, TEXT[:length]).ending == FOREIGN


def test_a_prompt_says_which_question_it_is() -> None:
    assert question_in(QUESTION.prompt) == QUESTION
    assert question_in("Hello") is None
