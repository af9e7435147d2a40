"""Usage as each vendor reports it, and its cost at each kind of price, worked out by hand."""

from __future__ import annotations

from typing import Any

Usage = dict[str, Any]

_BASE = {"input_cost_per_token": 1e-6, "output_cost_per_token": 1e-5}
PRICES: dict[str, dict[str, float]] = {
    "flat": _BASE,
    "cached": {**_BASE, "cache_read_input_token_cost": 1e-7},
    "written": {
        **_BASE,
        "cache_creation_input_token_cost": 1.25e-6,
        "cache_creation_input_token_cost_above_1hr": 2e-6,
    },
    "audio": {**_BASE, "input_cost_per_audio_token": 4e-5, "output_cost_per_audio_token": 8e-5},
    "reasoning": {**_BASE, "output_cost_per_reasoning_token": 3e-5},
    "tiered": {
        **_BASE,
        "cache_read_input_token_cost": 1e-7,
        "input_cost_per_token_above_200k_tokens": 2e-6,
        "output_cost_per_token_above_200k_tokens": 2e-5,
        "cache_read_input_token_cost_above_200k_tokens": 2e-7,
    },
}


def openai(prompt: int, completion: int, total: int | None = None, **more: Any) -> Usage:
    whole = prompt + completion if total is None else total
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": whole, **more}


# of 1,000 tokens of a prompt and 100 of an answer, or as the name says
REPORTS: dict[str, dict[str, Usage]] = {
    "plain": {
        "openai": openai(1000, 100, prompt_tokens_details={"cached_tokens": 0, "audio_tokens": 0}),
        "vllm": openai(1000, 100, prompt_tokens_details=None, completion_tokens_details=None),
        "mistral": openai(1000, 100, prompt_audio_seconds=None),
        "groq": openai(1000, 100, queue_time=0.05, prompt_time=0.001, completion_time=0.2, total_time=0.201),
        "openrouter": openai(1000, 100, cost=0.95, cost_details={"upstream_inference_cost": 19}),
        "responses": {"input_tokens": 1000, "output_tokens": 100, "total_tokens": 1100},
        "floats": openai(1000, 100) | {"prompt_tokens": 1000.0, "completion_tokens": 100.0},
    },
    "800 cached": {
        "openai": openai(1000, 100, prompt_tokens_details={"cached_tokens": 800}),
        "deepseek": openai(1000, 100, prompt_cache_hit_tokens=800, prompt_cache_miss_tokens=200),
        "moonshot": openai(1000, 100, cached_tokens=800),
        "anthropic": {"input_tokens": 200, "cache_read_input_tokens": 800, "output_tokens": 100},
        "responses": {
            "input_tokens": 1000,
            "input_tokens_details": {"cached_tokens": 800},
            "output_tokens": 100,
            "total_tokens": 1100,
        },
        "gemini": {
            "promptTokenCount": 1000,
            "cachedContentTokenCount": 800,
            "candidatesTokenCount": 100,
            "totalTokenCount": 1100,
        },
    },
    "900 written": {
        "openrouter": openai(1000, 100, prompt_tokens_details={"cached_tokens": 0, "cache_write_tokens": 900}),
        "litellm": openai(
            *(1000, 100),
            cache_creation_input_tokens=900,
            cache_read_input_tokens=0,
            prompt_tokens_details={"cached_tokens": 0, "cache_creation_tokens": 900},
        ),
        "anthropic": {"input_tokens": 100, "cache_creation_input_tokens": 900, "output_tokens": 100},
    },
    "400 and 500 for an hour written": {
        "anthropic": {
            "input_tokens": 100,
            "cache_creation_input_tokens": 900,
            "output_tokens": 100,
            "cache_creation": {"ephemeral_5m_input_tokens": 400, "ephemeral_1h_input_tokens": 500},
        },
        "litellm": openai(
            *(1000, 100),
            cache_creation_input_tokens=900,
            prompt_tokens_details={
                "cache_creation_tokens": 900,
                "cache_creation_token_details": {
                    "ephemeral_5m_input_tokens": 400,
                    "ephemeral_1h_input_tokens": 500,
                },
            },
        ),
    },
    "900 and 90 audio": {
        "openai": openai(
            *(1000, 100),
            prompt_tokens_details={"audio_tokens": 900, "cached_tokens": 0},
            completion_tokens_details={"audio_tokens": 90},
        ),
    },
    "500 reasoning": {  # and 100 of text
        "openai": openai(1000, 600, completion_tokens_details={"reasoning_tokens": 500}),
        "xai": openai(1000, 100, 1600, completion_tokens_details={"reasoning_tokens": 500}),
        "gemini": openai(1000, 100, 1600),
        "perplexity": openai(1000, 100, reasoning_tokens=500),
        "responses": {
            "input_tokens": 1000,
            "output_tokens": 600,
            "total_tokens": 1600,
            "output_tokens_details": {"reasoning_tokens": 500},
        },
    },
    "long": {"openai": openai(300_000, 1000)},  # 300,000 and 1,000
    "long, 200,000 cached": {
        "openai": openai(300_000, 1000, prompt_tokens_details={"cached_tokens": 200_000}),
        "anthropic": {"input_tokens": 100_000, "cache_read_input_tokens": 200_000, "output_tokens": 1000},
    },
}

# In picodollars; a token of $1e-6 is 1,000,000 of them. By use and price; "flat" where a price says nothing of the use.
COSTS: dict[str, dict[str, int]] = {
    # 1000 x 1 + 100 x 10 microdollars
    "plain": {"flat": 2_000_000_000},
    # 200 x 1 + 800 x 0.1 + 100 x 10
    "800 cached": {"flat": 2_000_000_000, "cached": 1_280_000_000, "tiered": 1_280_000_000},
    # 100 x 1 + 900 x 1.25 + 100 x 10
    "900 written": {"flat": 2_000_000_000, "written": 2_225_000_000},
    # 100 x 1 + 400 x 1.25 + 500 x 2 + 100 x 10
    "400 and 500 for an hour written": {"flat": 2_000_000_000, "written": 2_600_000_000},
    # 100 x 1 + 900 x 40 + 10 x 10 + 90 x 80
    "900 and 90 audio": {"flat": 2_000_000_000, "audio": 43_400_000_000},
    # 1000 x 1 + 600 x 10; 1000 x 1 + 100 x 10 + 500 x 30
    "500 reasoning": {"flat": 7_000_000_000, "reasoning": 17_000_000_000},
    # 300,000 x 1 + 1000 x 10; 300,000 x 2 + 1000 x 20
    "long": {"flat": 310_000_000_000, "tiered": 620_000_000_000},
    # 300,000 x 1 + 10,000; 100,000 x 1 + 200,000 x 0.1 + 10,000; 100,000 x 2 + 200,000 x 0.2 + 1000 x 20
    "long, 200,000 cached": {"flat": 310_000_000_000, "cached": 130_000_000_000, "tiered": 260_000_000_000},
}


def picodollars(use: str, price: str) -> int:
    costs = COSTS[use]
    return costs.get(price, costs["flat"])


CASES = [(use, vendor) for use, reports in REPORTS.items() for vendor in reports]

# Three pieces of 40 bytes, which are estimated as 10 tokens each, of a prompt that is estimated as 4.
PIECES = 3
_ZERO = openai(0, 0)
_REPORTED = openai(1000, 100)
# Usage on each piece, and the cost in picodollars at the flat price, however the stream ends after them.
PARTIAL_REPORTS: dict[str, tuple[list[Usage | None], int]] = {
    # 4 x 1 + 30 x 10 microdollars
    "nothing": ([None, None, None], 304_000_000),
    "zeros on each": ([_ZERO, _ZERO, _ZERO], 304_000_000),
    # 1000 x 1 + 30 x 10
    "so far on each": ([openai(1000, 10), openai(1000, 20), openai(1000, 30)], 1_300_000_000),
    "the prompt at first": ([openai(1000, 0), None, None], 1_300_000_000),
    "one token at first": ([openai(1000, 1), None, None], 1_300_000_000),
    # 1000 x 1 + 20 x 10 were reported; of 120 bytes 30 tokens are estimated
    "two of three": ([openai(1000, 10), openai(1000, 20), None], 1_300_000_000),
    # 1000 x 1 + 100 x 10: more was reported than received
    "all at first": ([_REPORTED, None, None], 2_000_000_000),
    "all with the last piece": ([None, None, _REPORTED], 2_000_000_000),
    # 1000 x 1 + 3 x 10: a report that comes with the last bytes is right, however few tokens it counts
    "few at last": ([_ZERO, _ZERO, openai(1000, 3)], 1_030_000_000),
}
