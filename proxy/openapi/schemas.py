"""JSON schemas of bodies, as this server checks and writes them. What it passes on unread has no type here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxy.routing.chat_request import MOST, TIMEOUTS
from router_core.types import DEAREST, PRICE_FIELDS

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
POSITIVE: Schema = {"type": "number", "minimum": 0}
COUNT: Schema = {"type": "integer", "minimum": 0}
AMOUNT: Schema = {"type": "number", "minimum": 0}
WEIGHT: Schema = {**AMOUNT, "maximum": MOST}
SECONDS: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": MOST}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
NAME: Schema = {"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$"}
FREE: Schema = {"type": "object", "additionalProperties": True}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def null_or(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def listed(schema: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": schema, **more}


def closed(properties: Mapping[str, Schema], *required: str, **more: Any) -> Schema:
    """Other keys are refused."""
    return {**opened(properties, *required, **more), "additionalProperties": False}


def opened(properties: Mapping[str, Schema], *required: str, **more: Any) -> Schema:
    """Other keys may be there."""
    return {
        "type": "object",
        "properties": dict(properties),
        **({"required": list(required)} if required else {}),
        **more,
    }


PRICES = PRICE_FIELDS[:2]
BUCKETS = PRICE_FIELDS[2:]
TIERS = f"^({'|'.join(PRICE_FIELDS)})_above_[0-9]{{1,9}}k?_tokens$"
TOKEN_COST: Schema = {"type": "number", "minimum": 0, "maximum": DEAREST}
ABILITIES = (
    *("function_calling", "parallel_function_calling", "vision", "video_input", "audio_input", "audio_output"),
    *("pdf_input", "response_schema", "reasoning"),
)
WAITS = ("connect_timeout_s", "first_token_timeout_s", "idle_timeout_s")

BODIES: Mapping[str, Schema] = {
    "ChatBody": opened(
        {
            "model": {"type": "string", "minLength": 1, "example": "auto"},
            "messages": listed(FREE, minItems=1, example=[{"role": "user", "content": "What is 2 + 2?"}]),
            "stream": null_or({"type": "boolean"}),
            "stream_options": null_or(FREE),
            "uniroute": ref("Options"),
        },
        *("model", "messages"),
        description="OpenAI's body. Fields that are not listed reach the chosen model as they are; those that would"
        " steer the provider layer (api_base, api_key, extra_headers …) are refused.",
    ),
    "Options": closed(
        {
            "lambda": null_or(WEIGHT),
            "models": null_or(listed({"type": "string", "minLength": 1}, minItems=1)),
            "max_cost_usd": null_or(WEIGHT),
            "latency_weight": null_or(WEIGHT),
            "session": null_or({"type": "string", "minLength": 1, "maxLength": 255}),
            "fallbacks": null_or({"type": "boolean"}),
            "timeouts": null_or(closed(dict.fromkeys(TIMEOUTS, null_or(SECONDS)))),
        }
    ),
    "Addition": closed(
        {
            "model_name": NAME,
            "litellm_params": ref("Params"),
            "model_info": null_or(ref("Info")),
            "profile": null_or({"anyOf": [ref("Asking"), ref("Profile")]}),
        },
        *("model_name", "litellm_params"),
    ),
    "Params": opened(
        {"model": {"type": "string", "minLength": 1}},
        "model",
        description="LiteLLM's: model, api_base, api_key as os.environ/NAME_API_KEY, and fixed parameters.",
    ),
    "Info": opened(
        {
            **dict.fromkeys((*PRICES, *BUCKETS), null_or(TOKEN_COST)),
            **dict.fromkeys(("max_input_tokens", "max_output_tokens"), null_or({"type": "integer", "minimum": 1})),
            **{f"supports_{ability}": null_or({"type": "boolean"}) for ability in ABILITIES},
            **dict.fromkeys(WAITS, null_or(SECONDS)),
            "max_parallel_requests": null_or({"type": "integer", "minimum": 1}),
            "max_queued_requests": null_or({"type": "integer", "minimum": 0, "maximum": 10_000}),
            "supports_stream_options": null_or({"type": "boolean"}),
            "free": {"type": "boolean"},
        },
        patternProperties={TIERS: null_or(TOKEN_COST)},
        description="Fields that are not listed must be LiteLLM's.",
    ),
    "Asking": closed({"prompts": {"type": "integer", "minimum": 1, "maximum": 1000}, "max_usd": AMOUNT}),
    "Profile": opened(
        {
            "map": {"type": "string", "minLength": 1},
            "errors": listed(SHARE, minItems=1),
            "labels": listed({"type": "number", "minimum": 0}, minItems=1),
            "mean_error": SHARE,
            "mean_output_tokens": null_or({"type": "number"}),
            "mean_seconds": null_or({"type": "number"}),
            "measured_at": null_or(TEXT),
        },
        *("map", "errors", "labels"),
    ),
    "Change": closed({"litellm_params": null_or(FREE), "model_info": null_or(FREE)}),
    "Price": closed(
        {**dict.fromkeys(PRICES, TOKEN_COST), **dict.fromkeys(BUCKETS, null_or(TOKEN_COST))},
        *PRICES,
        patternProperties={TIERS: null_or(TOKEN_COST)},
        description="Names of tiers, as input_cost_per_token_above_200k_tokens, may be added to each.",
    ),
}

ANSWERS: Mapping[str, Schema] = {
    "Error": opened(
        {
            "error": opened(
                {"message": TEXT, "type": TEXT, "param": {}, "code": null_or(TEXT)}, "message", "type", "param", "code"
            )
        },
        "error",
    ),
    "Completion": opened({"model": TEXT, "choices": listed(FREE), "usage": {}}, "model", "choices"),
    "Event": opened({"data": TEXT}, "data", description="A chunk of OpenAI's as JSON, an error object, or [DONE]."),
    "Model": closed(
        {"id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT},
        *("id", "object", "created", "owned_by"),
    ),
    "Models": closed({"object": {"const": "list"}, "data": listed(ref("Model"))}, "object", "data"),
    "Decision": opened(
        {
            "decision": TEXT,
            "model": TEXT,
            "reason": TEXT,
            "lambda": {"type": "number", "minimum": 0},
            "max_tokens": null_or(closed({"stated": COUNT, "sent": COUNT}, "stated", "sent")),
            "clusters": listed(closed({"id": COUNT, "name": TEXT, "weight": SHARE}, "id", "name", "weight")),
            "candidates": listed(
                opened(
                    {
                        "model": TEXT,
                        "expected_error": SHARE,
                        "error_low": SHARE,
                        "error_high": SHARE,
                        **dict.fromkeys(("expected_cost_usd", "cost", "score"), NUMBER),
                        "flips_at_lambda": null_or({"type": "number", "minimum": 0}),
                    },
                    "model",
                )
            ),
            "ineligible": listed(closed({"model": TEXT, "why": TEXT}, "model", "why")),
        },
        *("decision", "model", "reason", "lambda", "max_tokens", "clusters", "candidates", "ineligible"),
    ),
    "Job": opened(
        {
            "id": TEXT,
            "model": TEXT,
            "state": {"enum": ["queued", "running", "ready", "failed", "cancelled"]},
            **dict.fromkeys(("done", "total", "failed", "unlabelled"), COUNT),
            **dict.fromkeys(("spent_usd", "eta_s"), null_or({"type": "number"})),
            "error": null_or(TEXT),
            "warning": TEXT,
        },
        *("id", "model", "state", "done", "total", "failed", "unlabelled", "spent_usd", "eta_s", "error"),
    ),
    "Accepted": closed({"model": TEXT, "job": null_or(TEXT)}, "model", "job"),
    "Card": opened(
        {
            "model_name": TEXT,
            "litellm_params": FREE,
            "model_info": FREE,
            "source": {"enum": ["config", "admin"]},
            "created_at": TEXT,
            "state": TEXT,
            "why": null_or(TEXT),
            "warning": null_or(TEXT),
            "price": null_or(ref("LivePrice")),
            "job": null_or(ref("Job")),
            "profile": null_or(ref("Profile")),
        },
        *("model_name", "litellm_params", "model_info", "source", "created_at", "state", "price", "job"),
    ),
    "LivePrice": opened(
        {
            **dict.fromkeys((*PRICES, *BUCKETS), POSITIVE),
            "source": TEXT,
            "updated_at": null_or(TEXT),
            "age_s": null_or({"type": "number", "minimum": 0}),
        },
        *(*PRICES, "source", "updated_at", "age_s"),
    ),
    "Cards": opened({"models": listed(ref("Card")), "state_version": COUNT}, "models", "state_version"),
    "Priced": closed({"model": TEXT, "price": null_or(ref("LivePrice"))}, "model", "price"),
    "Outcomes": closed({"outcomes": listed(FREE)}, "outcomes"),
    "Status": opened(
        {
            "status": TEXT,
            "state_version": COUNT,
            "store": {"enum": ["up", "away"]},
            "provider_lookups": COUNT,
        },
        "status",
    ),
}
