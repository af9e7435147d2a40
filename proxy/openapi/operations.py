"""Every call of the HTTP interface, one row each: what it takes, what it answers, which errors it may answer with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

CLIENT, ADMIN, OPEN = "client", "admin", "open"
"""Who may call: with a client key (or the admin key), with the admin key, anybody."""

ALWAYS = (400, 403, 503)
"""Of every call but the open ones: a path that cannot be, a Host or Origin, a server that is full or has no store."""
BODY = (408, 413, 415)
FROM_MODELS = (402, 404, 409, 422, 429, 500, 502, 504)
"""A model's own status passes through; these are the usual ones, and 404 also an unknown name of a model."""


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    """As FastAPI knows it, converters left out."""
    summary: str
    answers: Mapping[int, str | None]
    """Status → name of a schema; None: no body, "text": not JSON."""
    who: str = CLIENT
    body: str | None = None
    body_needed: bool = True
    errors: tuple[int, ...] = ()
    takes_lambda: bool = False
    takes_limit: bool = False
    any_status: bool = False
    """A model's own status passes through, whichever it is."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Name in the path → "name" of a model, or "id"."""

    @property
    def all_errors(self) -> tuple[int, ...]:
        if self.who == OPEN:
            return self.errors
        return tuple(sorted({*ALWAYS, 401, *self.errors, *(BODY if self.body else ())}))


_NAMED = {"name": "name"}
_JOB = {"job_id": "id"}
_KEY = {"key_id": "id"}
_MODELS = "/admin/models"
_KEYS = "/admin/keys"

OPERATIONS = (
    Operation("post", "/v1/chat/completions", "Ask the model that is chosen for this prompt", {200: "Completion"},
              body="ChatBody", errors=FROM_MODELS, takes_lambda=True, any_status=True),
    Operation("post", "/v1/route", "The decision for a chat body, nothing forwarded", {200: "Decision"},
              body="ChatBody", errors=(404,), takes_lambda=True),
    Operation("get", "/v1/models", "The models that this key may use", {200: "Models"}),
    Operation("get", "/v1/models/{name}", "One of them", {200: "Model"}, errors=(404,), parameters=_NAMED),
    Operation("get", "/openapi.json", "This document", {200: "Document"}),
    Operation("get", "/metrics", "Prometheus metrics", {200: "text"}),
    Operation("get", "/healthz", "The process is up", {200: "Status"}, who=OPEN),
    Operation("get", "/readyz", "It can route", {200: "Status", 503: "Status"}, who=OPEN),
    Operation("get", _MODELS, "Every registered model", {200: "Cards"}, who=ADMIN),
    Operation("post", _MODELS, "Add a model while the server runs", {201: "Accepted", 202: "Accepted"}, who=ADMIN,
              body="Addition", errors=(409,)),
    Operation("get", _MODELS + "/{name}", "A model with its price and profile", {200: "Card"}, who=ADMIN, errors=(404,),
              parameters=_NAMED),
    Operation("patch", _MODELS + "/{name}", "Change what is stated of it", {200: "Card"}, who=ADMIN, body="Change",
              errors=(404, 409), parameters=_NAMED),
    Operation("delete", _MODELS + "/{name}", "Remove it", {204: None}, who=ADMIN, errors=(404, 409), parameters=_NAMED),
    Operation("post", _MODELS + "/{name}/profile", "Measure it again, or hand over a profile",
              {200: "Accepted", 202: "Accepted"}, who=ADMIN, body="Profiling", errors=(404, 409), parameters=_NAMED),
    Operation("put", _MODELS + "/{name}/pricing", "Replace its price", {200: "Priced"}, who=ADMIN, body="Price",
              errors=(404,), parameters=_NAMED),
    Operation("get", "/admin/jobs/{job_id}", "How far measuring is", {200: "Job"}, who=ADMIN, errors=(404,),
              parameters=_JOB),
    Operation("get", "/admin/jobs/{job_id}/outcomes", "Its graded answers", {200: "Outcomes"}, who=ADMIN, errors=(404,),
              parameters=_JOB),
    Operation("delete", "/admin/jobs/{job_id}", "Stop it", {200: "Job"}, who=ADMIN, errors=(404,), parameters=_JOB),
    Operation("get", _KEYS, "Every client key", {200: "Keys"}, who=ADMIN),
    Operation("post", _KEYS, "Make a client key; its secret is shown once", {201: "Secret"}, who=ADMIN, body="NewKey"),
    Operation("get", _KEYS + "/{key_id}", "A client key", {200: "Key"}, who=ADMIN, errors=(404,), parameters=_KEY),
    Operation("patch", _KEYS + "/{key_id}", "Change it", {200: "Key"}, who=ADMIN, body="KeyChange", errors=(404, 409),
              parameters=_KEY),
    Operation("delete", _KEYS + "/{key_id}", "Revoke it, for good", {204: None}, who=ADMIN, errors=(404, 409),
              parameters=_KEY),
    Operation("post", _KEYS + "/{key_id}/rotate", "Give it a new secret, shown once", {200: "Secret"}, who=ADMIN,
              body="Rotation", body_needed=False, errors=(404, 409), parameters=_KEY),
    Operation("get", "/admin/audit", "Who changed what, newest first", {200: "Audit"}, who=ADMIN, takes_limit=True),
)  # fmt: skip
