"""A choice as POST /v1/route shows it. Decides nothing."""

from __future__ import annotations

from typing import Any

from proxy.routing.choosing import Choice


def to_json(choice: Choice) -> dict[str, Any]:
    """The decision as POST /v1/route shows it."""
    decision = choice.decision
    clusters = decision.clusters if decision and decision.assignment is not None else ()
    return {
        "decision": choice.id,
        "model": choice.model,
        "reason": choice.reason,
        "lambda": choice.lambda_,
        "max_tokens": _limit(choice),
        "clusters": [{"id": cluster, "name": name, "weight": weight} for cluster, name, weight in clusters],
        "candidates": [
            {
                "model": row.model,
                "expected_error": row.expected_error,
                "error_low": row.error_low,
                "error_high": row.error_high,
                "expected_cost_usd": row.expected_cost_usd,
                "cost": row.cost,
                "score": row.score,
                "flips_at_lambda": row.flips_at_lambda,
            }
            for row in (decision.candidates if decision else ())
        ],
        "ineligible": [{"model": name, "why": why} for name, why in choice.ineligible.items()],
    }


def _limit(choice: Choice) -> dict[str, int] | None:
    """Tokens of an answer that the request states, and that the model would be told; None: none are stated."""
    stated = choice.needs.max_output_tokens
    return None if stated is None else {"stated": stated, "sent": choice.max_tokens or stated}
