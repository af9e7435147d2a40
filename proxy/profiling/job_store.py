"""Jobs in Redis: their records, the store that reads and writes them, and the leases of the workers that run them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from time import monotonic
from typing import Any, Final, TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from proxy.concurrency import cancel_and_wait
from proxy.storage.audit_log import Step
from proxy.storage.profile_history import REMEMBER, ProfileEntry, history_key
from proxy.storage.records import InvalidRecord, ModelRecord, StoredProfile, WarnOnce, json_object, number, whole_number
from proxy.storage.redis import (
    CHANGED,
    LATEST_JOBS,
    MODELS,
    PREVIOUS_PROFILES,
    PROFILES,
    VERSION,
    Store,
    StoreUnavailable,
    awaited,
    load_script,
)
from proxy.storage.variants import joint_fingerprint
from router_core.profiles import MAX_VALUE, Profile

log = logging.getLogger("uniroute.jobs")

# Every job's id, by the time of its submission.
JOBS: Final = "uniroute:jobs"

# The set of unfinished jobs.
OPEN: Final = f"{JOBS}:open"

# How long a finished job can still be read.
KEPT_S = 30 * 86_400


def job_key(job_id: str) -> str:
    return f"uniroute:job:{job_id}"


def answers_key(job_id: str) -> str:
    return f"{job_key(job_id)}:answers"


def texts_key(job_id: str) -> str:
    return f"{job_key(job_id)}:texts"


def reserved_key(job_id: str) -> str:
    return f"{job_key(job_id)}:reserved"


def lease_key(job_id: str) -> str:
    return f"{job_key(job_id)}:lease"


def enqueued_key(job_id: str) -> str:
    return f"{job_key(job_id)}:kicked"


_Entry = TypeVar("_Entry")

MAX_PROMPTS: Final = 1_000_000

UNFINISHED = frozenset({"queued", "running"})


@dataclass(frozen=True)
class Job:
    """The profiling of one model. Of `done` prompts, all that are neither `failed` nor `unlabelled` have a label."""

    id: str
    model: str
    state: str
    """queued, running, ready, failed or cancelled."""
    done: int
    total: int
    failed: int
    """Prompts that the model did not answer, after all retries."""
    unlabelled: int
    """Answers that could not be graded: cut off by our limit, empty after reasoning, or the judge failed."""
    spent_usd: float | None
    """None: the model has no known price."""
    eta_s: float | None
    error: str | None
    fingerprint: str = ""
    max_usd: float | None = None
    measured_at: str | None = None
    """RFC 3339, UTC: when the answers were given that this job reuses from an earlier one. None: it is not known, or it
    reuses none."""
    carried_over: bool = False
    """Whether it makes a profile for another map of the answers of an earlier job."""
    efforts: tuple[str, ...] = ()
    """The efforts of the model that it measures, ascending; none: it measures the model as it is."""
    prompts_of_efforts: int | None = None
    """The prompts that are dealt out among them. None: `total` are put to the model."""

    @property
    def prompts(self) -> int:
        """Return how many prompts it is for."""
        return self.total if self.prompts_of_efforts is None else self.prompts_of_efforts

    @property
    def measured(self) -> dict[str, str]:
        """Return the names that it measures, each with what the ids of its answers end with after the prompt's."""
        return {f"{self.model}@{effort}": f"@{effort}" for effort in self.efforts} or {self.model: ""}

    def answers_of(self, suffix: str, answers: Mapping[str, PromptAnswer]) -> dict[str, PromptAnswer]:
        """Return the answers whose ids end with a suffix of `measured`, by the ids of their prompts."""
        if not suffix:
            return dict(answers)
        return {place.removesuffix(suffix): answer for place, answer in answers.items() if place.endswith(suffix)}

    @property
    def unfinished(self) -> bool:
        return self.state in UNFINISHED

    def to_json(self) -> dict[str, Any]:
        """Return what the admin API shows."""
        shown = ("id", "model", "state", "done", "total", "failed", "unlabelled", "spent_usd", "eta_s", "error")
        return {name: getattr(self, name) for name in shown}

    @classmethod
    def from_fields(cls, job_id: str, stored: Mapping[str, str]) -> Job | None:
        """Parse the stored hash; return None if it is missing, or is no job."""
        if not {"model", "state"} <= stored.keys():
            return None
        # A limit that cannot be read allows nothing.
        max_usd = (number(stored["max_usd"]) or 0.0) if stored.get("max_usd") else None
        return cls(
            id=job_id,
            model=stored["model"],
            state=stored["state"],
            done=whole_number(stored.get("done")) or 0,
            total=min(whole_number(stored.get("total")) or 0, MAX_PROMPTS),
            failed=whole_number(stored.get("failed")) or 0,
            unlabelled=whole_number(stored.get("unlabelled")) or 0,
            spent_usd=_spent(stored.get("spent_usd"), max_usd),
            eta_s=number(stored.get("eta_s")),
            error=stored.get("error") or None,
            fingerprint=stored.get("fingerprint", ""),
            max_usd=max_usd,
            measured_at=stored.get("measured_at") or None,
            carried_over=bool(stored.get("map")),
            efforts=tuple(filter(None, (stored.get("efforts") or "").split(","))),
            prompts_of_efforts=whole_number(stored.get("prompts"), MAX_PROMPTS),
        )


def _spent(stored: str | None, max_usd: float | None) -> float | None:
    """Return what was spent; if that cannot be read, all that may be spent."""
    return None if not stored else max_usd if (spent := number(stored)) is None else spent


# What is kept of the text of an answer.
MAX_TEXT_CHARS: Final = 4_000

_MAX_VALUES: Final = {"score": 1.0, "output_tokens": MAX_VALUE, "seconds": MAX_VALUE, "cost_usd": MAX_VALUE}


@dataclass(frozen=True, slots=True)
class AnswerText:
    """What a model answered to a validation prompt, and how long it was in all."""

    beginning: str = field(repr=False)
    chars: int

    @classmethod
    def of(cls, text: str) -> AnswerText:
        return cls(text[:MAX_TEXT_CHARS], len(text))

    @property
    def is_whole(self) -> bool:
        return len(self.beginning) >= self.chars

    def to_json(self) -> str:
        return json.dumps({"text": self.beginning, "chars": self.chars})

    @classmethod
    def from_json(cls, stored: str) -> AnswerText:
        """Parse a stored text, or raise InvalidRecord."""
        document = json_object(stored)
        text, chars = document.get("text"), whole_number(document.get("chars"))
        if not isinstance(text, str) or chars is None:
            raise InvalidRecord("the text of an answer needs `text`, and `chars` as a whole number")
        return cls(text[:MAX_TEXT_CHARS], chars)


@dataclass(frozen=True, slots=True)
class PromptAnswer:
    """The outcome of one validation prompt. None: not known."""

    score: float | None = None
    """In [0, 1]; None: unlabelled."""
    output_tokens: float | None = None
    seconds: float | None = None
    cost_usd: float | None = None
    finish_reason: str | None = None
    failed: bool = False
    text: AnswerText | None = field(default=None, compare=False)
    """Stored beside the rest, which is read far more often."""

    def to_json(self) -> str:
        return json.dumps({column.name: getattr(self, column.name) for column in fields(self) if column.name != "text"})

    @classmethod
    def from_json(cls, text: str) -> PromptAnswer:
        """Parse a stored answer, or raise InvalidRecord."""
        stored = json_object(text)
        reason, failed = stored.get("finish_reason"), stored.get("failed", False)
        numbers = {name: stored.get(name) for name in ("score", "output_tokens", "seconds", "cost_usd")}
        broken = [
            name for name, value in numbers.items() if value is not None and number(value, _MAX_VALUES[name]) is None
        ]
        if broken or not isinstance(reason, str | None) or not isinstance(failed, bool):
            raise InvalidRecord(f"not an answer to a prompt: {', '.join(broken) or 'finish_reason, failed'}")
        return cls(**numbers, finish_reason=reason, failed=failed)


@dataclass(frozen=True)
class ReusedAnswers:
    """Answers of an earlier job, paid for already, with which a new job begins."""

    earlier: str
    """The id of the earlier job."""
    map_id: str
    """The cluster map to measure on. Workers of other maps do not take the job."""
    answers: Mapping[str, PromptAnswer]
    """By their ids."""
    measured_at: str | None
    with_texts: bool = True
    """Whether the texts of the answers are taken over too."""
    profile: str | None = None
    """The name under which the earlier job's profile is stored. None: that of the model."""

    @property
    def labels(self) -> int:
        return sum(answer.score is not None for answer in self.answers.values())

    def to_fields(self) -> dict[str, Any]:
        """Return the fields of the new job's hash that depend on these answers."""
        done = len(self.answers)
        counted = {"done": done, "unlabelled": done - self.labels}
        return {**counted, "map": self.map_id, "measured_at": self.measured_at or ""}


class LeaseLost(Exception):
    """The job belongs to another worker now, or was cancelled. This worker may write nothing more for it."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right of one worker to run a job, until it expires."""

    job_id: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)


SUBMIT: Final = load_script(__package__, "submit_job", KEPT_S=KEPT_S)

CANCEL: Final = load_script(__package__, "cancel_job", KEPT_S=KEPT_S)

FORGET_LATEST: Final = load_script(__package__, "forget_latest")

# These begin with fence.lua, which returns -1 unless the worker has the lease.
BEGIN: Final = load_script(__package__, "fence", "begin_job")

RESERVE: Final = load_script(__package__, "fence", "reserve_usd")

CHECKPOINT: Final = load_script(__package__, "fence", "store_answer")

FINISH: Final = REMEMBER + load_script(__package__, "fence", "finish_job", CHANGED=CHANGED, KEPT_S=KEPT_S)


class JobStore:
    """Jobs and their answers in Redis.

    All methods raise StoreUnavailable; those that take a lease raise LeaseLost if it is lost.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._warn_once = WarnOnce(log)

    async def submit(
        self,
        records: Sequence[ModelRecord],
        prompts: int,
        max_usd: float | None,
        reused: ReusedAnswers | None = None,
    ) -> str:
        """Submit a job. Return its id, or that of the unfinished job that measures the same model.

        Args:
            records: the model, or each of its efforts, ascending.
            prompts: put to the model, or dealt out among its efforts.

        With `reused`, return "" if the model's profile is no longer that of the earlier job: it was measured meanwhile.
        """
        step = self.submission(records, prompts, max_usd, reused)
        return str(await self._store.run_durably("submit a job", step.script, step.keys, step.arguments))

    def submission(
        self,
        records: Sequence[ModelRecord],
        prompts: int,
        max_usd: float | None,
        reused: ReusedAnswers | None = None,
    ) -> Step:
        """Return the step that `submit` runs, to be run together with another write."""
        job_id, now = uuid.uuid4().hex[:16], time.time()
        name, fingerprint = records[0].registered_name, joint_fingerprint(records)
        efforts = [str(record.effort) for record in records if record.effort is not None]
        stored = {
            "model": name,
            "fingerprint": fingerprint,
            **({"efforts": ",".join(efforts), "prompts": prompts} if efforts else {}),
            "state": "queued",
            "total": prompts,
            "max_usd": "" if max_usd is None else max_usd,
            "submitted_at": now,
        }
        answers = {}
        if reused is not None:
            stored |= reused.to_fields()
            answers = {prompt_id: answer.to_json() for prompt_id, answer in reused.answers.items()}
        source = ["", "", "", ""]
        if reused is not None:
            source = [reused.map_id, reused.earlier, reused.profile or name, "1" if reused.with_texts else ""]
        arguments = [job_id, name, fingerprint, now, *source, 2 * len(stored), *_pairs(stored)]
        keys = (JOBS, OPEN, LATEST_JOBS, PROFILES, job_key(job_id), answers_key(job_id), texts_key(job_id))
        return Step(SUBMIT, keys, (*arguments, *_pairs(answers)))

    async def get(self, job_id: str) -> Job | None:
        async with self._store.operation("read a job") as client:
            return Job.from_fields(job_id, await _hash(client, job_key(job_id)))

    async def for_model(self, name: str) -> Job | None:
        """Return the model's latest job."""
        async with self._store.operation("read a job") as client:
            job_id = await awaited(client.hget(LATEST_JOBS, name))
        return await self.get(job_id) if job_id else None

    async def latest(self) -> dict[str, Job]:
        """Return each model's latest job."""
        async with self._store.operation("read the jobs") as client:
            ids = await _hash(client, LATEST_JOBS)
            async with client.pipeline(transaction=False) as pipe:
                for job_id in ids.values():
                    pipe.hgetall(job_key(job_id))
                replies = await pipe.execute(raise_on_error=False)
        found: dict[str, Job] = {}
        gone: list[str] = []
        for (name, job_id), reply in zip(ids.items(), replies, strict=True):
            if isinstance(reply, RedisError):
                self._warn_once(job_key(job_id), reply)
            elif (job := Job.from_fields(job_id, reply)) is not None:
                found[name] = job
            elif not reply:
                gone += [name, job_id]
        if gone:
            with contextlib.suppress(StoreUnavailable):  # a replica, which may be read all the same
                await self._run("forget jobs that are gone", FORGET_LATEST, [LATEST_JOBS], gone)
        return found

    async def submitted_between(self, since: float, until: float) -> list[tuple[float, Job]]:
        """Return the jobs that were submitted in a time, Unix seconds, with the time of each."""
        async with self._store.operation("read the jobs") as client:
            listed = await awaited(client.zrangebyscore(JOBS, since, until, withscores=True))
            async with client.pipeline(transaction=False) as pipe:
                for job_id, _ in listed:
                    pipe.hgetall(job_key(job_id))
                replies = await pipe.execute(raise_on_error=False)
        found = []
        for (job_id, at), reply in zip(listed, replies, strict=True):
            if isinstance(reply, RedisError):
                self._warn_once(job_key(job_id), reply)
            elif (job := Job.from_fields(job_id, reply)) is not None:
                found.append((at, job))
        return found

    async def cancel(self, job_id: str, why: str = "") -> bool:
        """Cancel a job; return False if it had ended."""
        keys = [job_key(job_id), OPEN, answers_key(job_id), texts_key(job_id)]
        return bool(await self._run("cancel a job", CANCEL, keys, [job_id, why]))

    async def answers(self, job_id: str) -> dict[str, PromptAnswer]:
        """Return the answers of a job by prompt id, without those that cannot be read."""
        async with self._store.operation("read the answers of a job") as client:
            stored = await _hash(client, answers_key(job_id))
        return self._parsed(answers_key(job_id), stored, PromptAnswer.from_json)

    async def answers_to(
        self, jobs: Mapping[str, tuple[str, str]], prompt_ids: Sequence[str]
    ) -> dict[str, dict[str, PromptAnswer]]:
        """Return the answers of some jobs to some prompts, with their texts as far as they are kept, in one round trip.

        Args:
            jobs: what to call a job → its id, and what the ids of the answers end with after the prompt's.
        """
        if not jobs or not prompt_ids:
            return {}
        keys = [(key(job_id), end) for job_id, end in jobs.values() for key in (answers_key, texts_key)]
        async with self._store.operation("read answers") as client, client.pipeline(transaction=False) as pipe:
            for key, end in keys:
                pipe.hmget(key, [prompt_id + end for prompt_id in prompt_ids])
            replies = dict(zip(keys, await pipe.execute(raise_on_error=False), strict=True))

        def found(key: str, end: str, parse: Callable[[str], _Entry]) -> dict[str, _Entry]:
            if isinstance(reply := replies[key, end], RedisError):
                self._warn_once(key, reply)
                return {}
            kept = {prompt: text for prompt, text in zip(prompt_ids, reply, strict=True) if text is not None}
            return self._parsed(key, kept, parse)

        answers = {}
        for name, (job_id, end) in jobs.items():
            texts = found(texts_key(job_id), end, AnswerText.from_json)
            graded = found(answers_key(job_id), end, PromptAnswer.from_json)
            answers[name] = {prompt: replace(each, text=texts.get(prompt)) for prompt, each in graded.items()}
        return answers

    def _parsed(self, key: str, stored: Mapping[str, str], parse: Callable[[str], _Entry]) -> dict[str, _Entry]:
        """Parse the entries of a hash that can be parsed."""
        entries = {}
        for prompt_id, text in stored.items():
            try:
                entries[prompt_id] = parse(text)
            except InvalidRecord as error:
                self._warn_once(f"{key} {prompt_id}", error)
        return entries

    async def begin(self, lease: Lease, total: int, *, priced: bool) -> None:
        """Begin or continue a job. What an earlier worker reserved for a prompt and did not settle counts as spent."""
        await self._fenced("begin a job", BEGIN, lease, [total, "1" if priced else "0"])

    async def reserve(self, lease: Lease, prompt_id: str, usd: float) -> None:
        """Store that a prompt may cost so many USD, until `checkpoint` stores its answer."""
        await self._fenced("reserve money", RESERVE, lease, [prompt_id, repr(usd)])

    async def checkpoint(self, lease: Lease, prompt_id: str, answer: PromptAnswer, eta_s: float | None) -> None:
        """Store the outcome of one prompt, and the text of its answer if there is one, if it has none yet."""
        kind = "failed" if answer.failed else "unlabelled" if answer.score is None else ""
        cost = "" if answer.cost_usd is None else repr(answer.cost_usd)
        eta = "" if eta_s is None else f"{eta_s:.1f}"
        text = "" if answer.text is None else answer.text.to_json()
        arguments = [prompt_id, answer.to_json(), kind, cost, eta, text]
        await self._fenced("store an answer", CHECKPOINT, lease, arguments, [texts_key(lease.job_id)])

    async def finish(
        self,
        lease: Lease,
        measured: Sequence[tuple[ModelRecord, Profile, float | None]],
        recipe: str | None = None,
        error: str = "",
    ) -> None:
        """Mark the job ready, store its profiles, each with its history, and release the lease, in one step.

        Args:
            measured: each record with its profile, and the USD of its answers if they are not all that the job spent.
            error: says which of several efforts have no profile.
        """
        job, now = await self.get(lease.job_id), time.time()
        words: list[str] = []
        for record, profile, spent_usd in measured:
            entry = ProfileEntry.of(
                record,
                profile,
                now,
                source="carried_over" if job and job.carried_over else "job",
                recipe=recipe,
                job=lease.job_id,
                spent_usd=spent_usd if spent_usd is not None else job.spent_usd if job else None,
            )
            stored = StoredProfile(record.fingerprint, profile, lease.job_id).to_json()
            words += [record.name, stored, entry.to_text()]
        first = measured[0][0]
        required = "" if first.source == "config" else first.registered_name
        await self._finish(lease, "ready", error, [required, *words])

    async def fail(self, lease: Lease, error: str) -> None:
        """Mark the job failed, and release the lease. The model keeps an earlier profile."""
        await self._finish(lease, "failed", error, [""])

    async def _finish(self, lease: Lease, state: str, error: str, result: list[str]) -> None:
        histories = map(history_key, result[1::3])
        texts = texts_key(lease.job_id)
        more_keys = [OPEN, VERSION, PROFILES, MODELS, PREVIOUS_PROFILES, texts, LATEST_JOBS, *histories]
        await self._fenced("finish a job", FINISH, lease, [lease.job_id, state, error, *result], more_keys)

    async def _fenced(
        self, what: str, script: str, lease: Lease, arguments: Sequence[Any], more_keys: Sequence[str] = ()
    ) -> None:
        """Run a script that only the worker with the lease may run. Raise LeaseLost for any other."""
        job_id = lease.job_id
        keys = [lease_key(job_id), job_key(job_id), answers_key(job_id), reserved_key(job_id), *more_keys]
        if await self._run(what, script, keys, [lease.token, *arguments]) == -1:
            raise LeaseLost("the job was cancelled or taken over")

    async def _run(self, what: str, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        async with self._store.operation(what) as client:
            return await client.register_script(script)(keys=list(keys), args=list(arguments))


def _pairs(fields: Mapping[str, Any]) -> list[Any]:
    """Return names and values one after the other, as HSET takes them."""
    return [word for pair in fields.items() for word in pair]


async def _hash(client: Redis, key: str) -> Mapping[str, str]:
    found: Mapping[str, str] = await awaited(client.hgetall(key))
    return found


LEASE_S = 8.0

HEARTBEAT_S = 2.0

# Work stops after so long without a renewal: one more failed attempt to renew might take until the lease has expired.
RENEWAL_GRACE_S = 4.0

# How often a job may be taken and neither finished nor given back. What kills a worker, or freezes it for longer than a
# lease, would do so each time.
MAX_TRIES = 5

GIVEN_UP = (
    f"given up after {MAX_TRIES} tries: each time the worker that measured the model died or lost its lease, and its"
    " log says more; profile the model again"
)

_TAKE = load_script(__package__, "take_job", GIVEN_UP=GIVEN_UP, KEPT_S=KEPT_S, MAX_TRIES=MAX_TRIES)

_RENEW = load_script(__package__, "renew_lease")

_RELEASE = load_script(__package__, "release_lease")


class Leases:
    """Take, renew and release leases, for a worker that measures on one cluster map."""

    def __init__(self, store: Store, map_id: str = "") -> None:
        self._store = store
        self._map_id = map_id

    async def take(self, job_id: str) -> Lease | None:
        """Take a job; None: it has ended, has a worker, or is for another map. One that was tried too often fails.

        Raises:
            StoreUnavailable: the job may be taken all the same, until the lease expires.
        """
        lease = Lease(job_id)
        taken = await self._run("take a job", _TAKE, lease)
        if taken == 2:
            log.error("job %s: %s", job_id, GIVEN_UP)
        return lease if taken == 1 else None

    async def renew(self, lease: Lease) -> bool:
        """Renew a lease; return False if it is lost or the job was cancelled. Raise StoreUnavailable."""
        return bool(await self._run("renew a lease", _RENEW, lease))

    async def release(self, lease: Lease) -> None:
        """Let another worker take the job at once. Raise StoreUnavailable; then the lease expires."""
        await self._run("release a lease", _RELEASE, lease)

    async def hold(self, lease: Lease, work: asyncio.Task[Any]) -> None:
        """Renew the lease until `work` is done. If that fails, cancel `work` before another worker can take the job.

        Raises:
            LeaseLost: `work` was cancelled.
        """
        renewed_at = monotonic()
        try:
            while not (await asyncio.wait({work}, timeout=HEARTBEAT_S))[0]:
                asked_at = monotonic()
                try:
                    if not await self.renew(lease):
                        raise LeaseLost("the job was cancelled or taken over")
                    renewed_at = asked_at
                except StoreUnavailable as error:
                    if monotonic() - renewed_at >= RENEWAL_GRACE_S:
                        raise LeaseLost(str(error)) from error
        finally:
            if not work.done():
                await cancel_and_wait(work)

    async def _run(self, what: str, script: str, lease: Lease) -> Any:
        job_id = lease.job_id
        keys = [
            job_key(job_id),
            lease_key(job_id),
            enqueued_key(job_id),
            answers_key(job_id),
            reserved_key(job_id),
            OPEN,
            texts_key(job_id),
        ]
        async with self._store.operation(what) as client:
            return await client.register_script(script)(
                keys=keys, args=[lease.token, int(LEASE_S * 1000), self._map_id, job_id]
            )
