"""JSON schemas of client keys and of the audit trail, as /admin/keys and /admin/audit take and give them."""

from __future__ import annotations

from collections.abc import Mapping

from proxy.openapi.schemas import NAME, TEXT, Schema, closed, listed, null_or, opened, ref
from proxy.routes.key_bodies import MOST_EXPIRY_S, MOST_GRACE_S
from proxy.storage.client_keys import MOST_LAMBDA, MOST_PER_MINUTE, MOST_USD, ROLES

_WEIGHT: Schema = {"type": "number", "minimum": 0, "maximum": MOST_LAMBDA}
_RATE: Schema = {"type": "integer", "minimum": 1, "maximum": MOST_PER_MINUTE}
_USD: Schema = {"type": "number", "minimum": 0, "maximum": MOST_USD}
_TIME: Schema = {"type": "string", "format": "date-time"}
_ROLE: Schema = {"enum": list(ROLES)}
_STATED: Mapping[str, Schema] = {
    **dict.fromkeys(("lambda_default", "lambda_min", "lambda_max"), null_or(_WEIGHT)),
    **dict.fromkeys(("requests_per_minute", "tokens_per_minute"), null_or(_RATE)),
    **dict.fromkeys(("usd_per_day", "usd_per_month"), null_or(_USD)),
}
_CHANGE: Mapping[str, Schema] = {
    "name": {"type": "string", "minLength": 1, "maxLength": 200},
    "models": null_or(listed(NAME, minItems=1)),
    "role": null_or(_ROLE),
    "expires_at": null_or(_TIME),
    "expires_in_s": null_or({"type": "number", "minimum": 0, "maximum": MOST_EXPIRY_S}),
    **_STATED,
}
_SHOWN: Mapping[str, Schema] = {
    **dict.fromkeys(("id", "name"), TEXT),
    "role": _ROLE,
    "models": null_or(listed(TEXT)),
    **dict.fromkeys(("expires_at", "previous_secret_until"), null_or(TEXT)),
    "created_at": TEXT,
    "revoked": {"type": "boolean"},
    **_STATED,
}

KEYS: Mapping[str, Schema] = {
    "NewKey": closed(_CHANGE, "name"),
    "KeyChange": closed(_CHANGE),
    "Rotation": closed({"grace_s": {"type": "number", "minimum": 0, "maximum": MOST_GRACE_S}}),
    "Key": closed(_SHOWN, *_SHOWN),
    "Secret": closed({**_SHOWN, "key": TEXT}, *_SHOWN, "key"),
    "Keys": closed({"keys": listed(ref("Key"))}, "keys"),
    "Audit": closed(
        {"entries": listed(opened(dict.fromkeys(("at", "who", "action", "target"), TEXT), "at", "who", "action"))},
        "entries",
    ),
}
