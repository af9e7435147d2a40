"""Account for a run: what clients saw, what upstreams gave, what is on record. Every discrepancy is a sentence.

A record that says `complete` costs exactly what the upstream's ledger says of that answer, in picodollars.
Where the upstream reported nothing, and for an attempt that was broken off, the cost is an estimate and says so:
between nothing and the whole prompt and answer of that attempt, four bytes to a token. If the client left before the
request reached its upstream, the cost is the prompt at most: it may have arrived.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxy.routing.requirements import estimate_tokens
from router_core.pricing import picousd
from router_core.text import BYTES_PER_TOKEN
from tests.chaos.behaviours import EMPTY_ANSWER
from tests.chaos.ledger import Attempt
from tests.chaos.outcomes import ACCOUNTED, COMPLETE, DROPPED, EMPTY, Outcome, Span
from tests.chaos.questions import MODELS, ChaosModel, Question
from tests.chaos.world import Logged

Record = Mapping[str, Any]
# A connection of a killed worker may be found dead that much later, and its answer be unrecorded.
AROUND_A_KILL_S = 2.0


@dataclass(frozen=True)
class Evidence:
    outcomes: Sequence[Outcome]
    attempts: Sequence[Attempt]
    records: Sequence[Record]
    logged: Sequence[Logged]
    totals: Mapping[str, Mapping[str, str]]
    kills: Sequence[float] = ()
    """When workers were killed, in monotonic seconds."""


@dataclass
class Account:
    problems: list[str] = field(default_factory=list)
    complete_pico: int = 0
    """Recorded for what is on record as complete."""
    ledger_pico: int = 0
    """The upstreams' own sum for the same."""
    aborted_pico: int = 0
    aborted_bound_pico: int = 0
    estimated: int = 0
    """Complete records of answers without usage."""
    estimated_pico: int = 0
    estimated_bound_pico: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    """Of the records."""


def account(evidence: Evidence) -> Account:
    index = _Index(evidence)
    found = Account(endings=Counter(record["ending"] for record in evidence.records))
    for problems in (
        _unaccounted(evidence),
        _unrecorded(evidence, index),
        _miscounted(evidence, index, found),
        _undone(evidence, index),
        _repeated(evidence),
        _unlogged(evidence, index),
        _wrong_totals(evidence),
        _empty_answers(evidence),
    ):
        found.problems += problems
    return found


class _Index:
    def __init__(self, evidence: Evidence) -> None:
        seen = {outcome.decision: outcome.question.id for outcome in evidence.outcomes if outcome.decision}
        self.question = {**seen, **{line.decision: line.question for line in evidence.logged}}
        self.attempts: dict[tuple[str, str], list[Attempt]] = defaultdict(list)
        for attempt in evidence.attempts:
            self.attempts[attempt.question, attempt.model].append(attempt)
        self._questions = {outcome.question.id: outcome.question for outcome in evidence.outcomes}
        self.records: dict[str, list[Record]] = defaultdict(list)
        for record in evidence.records:
            self.records[record["decision"]].append(record)

    def attempts_of(self, record: Record) -> list[Attempt]:
        return self.attempts[self.question.get(record["decision"], ""), record["model"]]

    def bound(self, record: Record, attempts: Sequence[Attempt]) -> int:
        """Return the most that a record of one of these attempts may cost."""
        question = self._questions.get(self.question.get(record["decision"], ""))
        prompt = _prompt_cost(MODELS[record["model"]], question) if question else 0
        return max((_cost(attempt, question) for attempt in attempts), default=prompt)


def spent_pico(record: Record) -> int | None:
    """Return the cost, None if unknown."""
    exact = record.get("cost_picousd")
    if exact is not None:
        return int(exact)
    return None if record["cost_usd"] is None else picousd(record["cost_usd"])


def _unaccounted(evidence: Evidence) -> Iterator[str]:
    """Check that every request has one clear end; a connection may drop only where a worker was just killed."""
    requests = Counter(outcome.question.id for outcome in evidence.outcomes)
    yield from (f"{question} was asked {count} times" for question, count in requests.items() if count > 1)
    for outcome in evidence.outcomes:
        description = f"{outcome.question.id} ({outcome.client}): {outcome.ending}, {outcome.verdict.detail}"
        if outcome.ending not in ACCOUNTED:
            yield description
        if outcome.ending == DROPPED and not near_a_kill(outcome.span, evidence.kills):
            yield f"{description}, though no worker was killed"


def near_a_kill(span: Span, kills: Iterable[float]) -> bool:
    began, ended = span[0] - AROUND_A_KILL_S, span[1] + AROUND_A_KILL_S
    return any(began <= kill <= ended for kill in kills)


def _unrecorded(evidence: Evidence, index: _Index) -> Iterator[str]:
    """Check that what a client saw complete is recorded as complete, once, under the model that it saw."""
    for outcome in evidence.outcomes:
        if outcome.ending not in (COMPLETE, EMPTY):
            continue
        records = index.records[outcome.decision or ""]
        complete = [record["model"] for record in records if record["ending"] == COMPLETE]
        if complete != [outcome.verdict.model]:
            yield (
                f"{outcome.question.id} ({outcome.client}) was answered by {outcome.verdict.model}, decision"
                f" {outcome.decision}; on record as complete: {complete or 'nothing'}"
            )


def _miscounted(evidence: Evidence, index: _Index, found: Account) -> Iterator[str]:
    """Check that complete records were given whole and cost what the upstream says, and others are within bounds."""
    for record in evidence.records:
        if record["decision"] not in index.question:
            continue  # told of by _unlogged
        attempts = index.attempts_of(record)
        name = f"{record['decision']} ({index.question.get(record['decision'])}, {record['model']}, {record['ending']})"
        spent = spent_pico(record)
        if record["ending"] == COMPLETE:
            given = [attempt for attempt in attempts if attempt.whole]
            yield from _complete_problem(name, spent, record, given, index.bound(record, given), found)
            continue
        bound = index.bound(record, attempts)
        found.aborted_pico += spent or 0
        found.aborted_bound_pico += bound
        if not 0 <= (spent or 0) <= bound:
            yield f"{name} is broken off and costs {spent}, more than the whole answer's {bound}"


def _complete_problem(
    name: str, spent: int | None, record: Record, given: Sequence[Attempt], bound: int, found: Account
) -> Iterator[str]:
    if not given:
        yield f"{name} is on record as complete, and no upstream gave it whole"
        return
    if record.get("estimated"):
        found.estimated += 1
        found.estimated_pico += spent or 0
        found.estimated_bound_pico += bound
        if any(attempt.usage is not None for attempt in given):
            yield f"{name} is estimated, though its upstream reported its usage"
        if not 0 < (spent or 0) <= bound:
            yield f"{name} is estimated at {spent}, which is not between 0 and {bound}"
        return
    owed = {MODELS[attempt.model].spend_pico(attempt.usage) for attempt in given}
    if spent not in owed:
        yield f"{name} costs {spent} picodollars on record and {owed} in the upstream's ledger"
    found.complete_pico += spent or 0
    found.ledger_pico += (spent if spent in owed else next(iter(owed))) or 0


def _cost(attempt: Attempt, question: Question | None) -> int:
    """Return the reported cost or the highest estimate, whichever is more."""
    model = MODELS[attempt.model]
    reported = model.spend_pico(attempt.usage) or 0
    if question is None:
        return reported
    answer = -(-len(question.answer(model.name)) // BYTES_PER_TOKEN)
    return max(reported, _prompt_cost(model, question) + answer * model.output_pico)


def _prompt_cost(model: ChaosModel, question: Question) -> int:
    return estimate_tokens({"messages": [{"role": "user", "content": question.prompt}]}) * model.input_pico


def _undone(evidence: Evidence, index: _Index) -> Iterator[str]:
    """Check that whatever an upstream gave whole is recorded in some way, unless its worker was killed."""
    by_question = {outcome.question.id: outcome for outcome in evidence.outcomes}
    decisions: dict[str, set[str]] = defaultdict(set)
    for decision, question in index.question.items():
        decisions[question].add(decision)
    for attempt in evidence.attempts:
        outcome = by_question.get(attempt.question)
        if not attempt.whole or outcome is None or near_a_kill(outcome.span, evidence.kills):
            continue
        recorded = [record for decision in decisions[attempt.question] for record in index.records[decision]]
        if not any(record["model"] == attempt.model for record in recorded):
            yield f"{attempt.model} answered {attempt.question} ({attempt.behaviour}), and nothing is on record of it"


def _repeated(evidence: Evidence) -> Iterator[str]:
    """Check that no record is there twice. Two of one decision and model differ in their time."""
    seen = Counter((record["decision"], record["model"], record["at"]) for record in evidence.records)
    yield from (f"{decision} ({model}) is on record {n} times" for (decision, model, _), n in seen.items() if n > 1)


def _unlogged(evidence: Evidence, index: _Index) -> Iterator[str]:
    """Check that each log line has its record and each record its line.

    A worker may be killed between the two, for one request at a time: the record is written first.
    """
    lines = Counter((line.decision, line.model, line.ending) for line in evidence.logged if line.ending)
    final = Counter((record["decision"], record["model"], record["ending"]) for record in evidence.records)
    yield from (f"{_named(index, *line)} is logged and not on record" for line in lines if line not in final)
    logged = {line.decision for line in evidence.logged}
    missing = sorted(decision for decision in index.records if decision not in logged)
    yield from (f"{decision} is on record and not in the log" for decision in missing[len(evidence.kills) :])


def _named(index: _Index, decision: str, model: str, ending: str | None) -> str:
    return f"{decision} ({index.question[decision]}, {model}, {ending})"


def _wrong_totals(evidence: Evidence) -> Iterator[str]:
    """Check that the sums per model are those of the records, to the picodollar."""
    for model in MODELS:
        records = [record for record in evidence.records if record["model"] == model]
        stored = evidence.totals.get(model, {})
        if int(stored.get("requests", 0)) != len(records):
            yield f"{model}: {stored.get('requests')} requests in the totals, {len(records)} on record"
        spent = sum(spent_pico(record) or 0 for record in records)
        if _total_pico(stored) != spent:
            yield f"{model}: {_total_pico(stored)} picodollars in the totals, {spent} on record"


def _total_pico(stored: Mapping[str, str]) -> int:
    exact = stored.get("cost_picousd")
    return int(exact) if exact is not None else picousd(float(stored.get("cost_usd", 0)))


def _empty_answers(evidence: Evidence) -> Iterator[str]:
    """Find clients that got no content, where no upstream had answered with none."""
    empty = {attempt.question for attempt in evidence.attempts if attempt.behaviour == EMPTY_ANSWER}
    for outcome in evidence.outcomes:
        if outcome.ending == EMPTY and outcome.question.id not in empty:
            yield f"{outcome.question.id} ({outcome.client}) got no word, and no upstream had said none"
