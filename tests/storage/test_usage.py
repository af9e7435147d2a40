from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import pytest

from proxy.cli.models import per_million
from proxy.profiling.model_client import cost_of as cost_of_answer
from proxy.profiling.model_client import read_answer
from proxy.storage.usage import (
    MAX_TOKENS,
    TokenCounts,
    UsageRecord,
    buckets_of,
    combine_usage,
    cost_usd,
    parse_usage,
    usage_of,
)
from router_core.types import Price
from tests.support.usage_reports import openai

PRICE = Price(1e-6, 4e-6, cache_read_input_token_cost=1e-7)


def test_cached_tokens_are_billed_once() -> None:
    counts = parse_usage(
        {
            "prompt_tokens": 1000,
            "completion_tokens": 100,
            "prompt_tokens_details": {"cached_tokens": 800},
            "completion_tokens_details": {"reasoning_tokens": 60},
        }
    )

    assert counts == TokenCounts(1000, 800, 100, 60)
    assert cost_usd(counts, PRICE) == pytest.approx(200e-6 + 80e-6 + 400e-6)


@pytest.mark.parametrize(
    "usage", [None, "x", {}, {"prompt_tokens": -1}, {"prompt_tokens": "3", "completion_tokens": 2}]
)
def test_the_cost_of_unreported_usage_is_unknown_not_zero(usage: Any) -> None:
    assert parse_usage(usage).prompt_tokens is None
    assert cost_usd(parse_usage(usage), PRICE) is None
    assert cost_usd(TokenCounts(1, 0, 1, 0), None) is None


@pytest.mark.parametrize(
    ("usage", "prompt", "output"),
    [
        (openai(1000, 100, 1600, completion_tokens_details={"reasoning_tokens": 500}), 1000, 600),
        (openai(1000, 600, completion_tokens_details={"reasoning_tokens": 500}), 1000, 600),
        (openai(1000, 100, 1600), 1000, 600),
        (openai(1340, 1505, reasoning_tokens=54_927), 1340, 56_432),
        (openai(21, 0, 81, completion_tokens_details={"reasoning_tokens": 60}), 21, 60),
        ({"prompt_tokens": 21, "total_tokens": 81}, 21, 60),
        ({"completion_tokens": 60, "total_tokens": 81}, 21, 60),
        ({"prompt_tokens": 0, "completion_tokens": 60, "total_tokens": 81}, 21, 60),
        (openai(1000, 100, 5), 1000, 100),
        (openai(0, 0, 50), 0, 0),
    ],
    ids=["xai", "openai", "gemini", "perplexity", "thoughts alone", "no output", "no prompt", "zero", "small", "total"],
)
def test_the_total_decides_whether_reasoning_is_part_of_the_answer(
    usage: dict[str, Any], prompt: int, output: int
) -> None:
    counts = parse_usage(usage)
    assert (counts.prompt_tokens, counts.output_tokens) == (prompt, output)


@pytest.mark.parametrize(
    ("usage", "prompt"),
    [
        ({"input_tokens": 100, "cache_read_input_tokens": 500, "cache_creation_input_tokens": 400}, 1000),
        ({"input_tokens": 1000, "cache_read_input_tokens": 500, "output_tokens": 10, "total_tokens": 1010}, 1000),
        ({"input_tokens": 500, "cache_read_input_tokens": 500, "output_tokens": 10, "total_tokens": 1010}, 1000),
        ({"input_tokens": 0, "cache_read_input_tokens": 1000, "output_tokens": 10}, 1000),
        ({"inputTokens": 100, "cacheReadInputTokens": 900, "outputTokens": 10, "totalTokens": 1010}, 1000),
        ({"input_tokens": 1000, "input_tokens_details": {"cached_tokens": 900}, "output_tokens": 10}, 1000),
        (openai(100, 10, cache_creation_input_tokens=900), 1000),
        (openai(1000, 10, cache_read_input_tokens=900), 1000),
        ({"prompt_tokens": 1000, "completion_tokens": 10, "input_tokens": 0, "output_tokens": 0}, 1000),
    ],
)
def test_cache_reads_and_writes_count_in_the_prompt_once(usage: dict[str, Any], prompt: int) -> None:
    assert parse_usage(usage).prompt_tokens == prompt


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (openai(1000, 10, cached_tokens=800), {"cached_tokens": 800}),
        (openai(1000, 10, prompt_cache_hit_tokens=800, prompt_cache_miss_tokens=200), {"cached_tokens": 800}),
        (openai(1000, 10, cached_tokens=800, prompt_tokens_details={"cached_tokens": 0}), {"cached_tokens": 800}),
        (openai(1000, 10, prompt_tokens_details={"cache_write_tokens": 900}), {"written_tokens": 900}),
        (openai(1000, 10, prompt_tokens_details={"cache_creation_tokens": 900}), {"written_tokens": 900}),
        (
            openai(1000, 10, cache_creation={"ephemeral_5m_input_tokens": 400, "ephemeral_1h_input_tokens": 500}),
            {"written_tokens": 400, "written_1h_tokens": 500},
        ),
        (
            openai(1000, 10, claude_cache_creation_5_m_tokens=400, claude_cache_creation_1_h_tokens=500),
            {"written_tokens": 400, "written_1h_tokens": 500},
        ),
        (
            {
                "promptTokenCount": 1000,
                "candidatesTokenCount": 10,
                "thoughtsTokenCount": 20,
                "totalTokenCount": 1030,
                "cachedContentTokenCount": 300,
                "promptTokensDetails": [{"modality": "AUDIO", "tokenCount": 600}, {"modality": "TEXT"}, 5],
                "cacheTokensDetails": [{"modality": "AUDIO", "tokenCount": 100}],
            },
            {"cached_tokens": 200, "cached_audio_tokens": 100, "audio_input_tokens": 500, "reasoning_tokens": 20},
        ),
        (
            openai(
                1000, 100, prompt_tokens_details={"image_tokens": 700}, completion_tokens_details={"image_tokens": 9}
            ),
            {"image_input_tokens": 700, "image_output_tokens": 9},
        ),
    ],
    ids=["moonshot", "deepseek", "both", "openrouter", "litellm", "anthropic", "new-api", "gemini", "images"],
)
def test_each_vendors_names_are_known(usage: dict[str, Any], expected: dict[str, int]) -> None:
    buckets = asdict(buckets_of(parse_usage(usage)))
    apart = {name: tokens for name, tokens in buckets.items() if name not in ("fresh_tokens", "output_tokens")}
    assert {name: tokens for name, tokens in apart.items() if tokens} == expected
    assert buckets["fresh_tokens"] >= 0


@pytest.mark.parametrize(
    "body",
    [
        {"usage": {"prompt_tokens": 3}},
        {"usage": None, "choices": [{"index": 0, "delta": {}, "usage": {"prompt_tokens": 3}}]},
        {"choices": [{"usage": {"prompt_tokens": 3}}, {"usage": None}, "odd"]},
        {"choices": [], "x_groq": {"id": "req", "usage": {"prompt_tokens": 3}}},
        {"usageMetadata": {"promptTokenCount": 3}},
        {"type": "message_start", "message": {"usage": {"input_tokens": 3}}},
        {"type": "response.completed", "response": {"usage": {"input_tokens": 3}}},
    ],
)
def test_usage_is_found_wherever_a_vendor_puts_it(body: dict[str, Any]) -> None:
    assert parse_usage(usage_of(body)).prompt_tokens == 3


@pytest.mark.parametrize("body", [{}, {"choices": "odd"}, {"choices": [None]}, {"x_groq": "odd", "message": None}])
def test_a_chunk_without_usage_has_none(body: dict[str, Any]) -> None:
    assert usage_of(body) is None


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (10.0, 10),
        (10.5, None),
        (math.nan, None),
        (math.inf, None),
        (-1, None),
        (10**13, None),
        (True, None),
        ("7", None),
    ],
)
def test_a_count_is_a_whole_number_or_unknown(value: Any, read: int | None) -> None:
    assert parse_usage({"prompt_tokens": value}).prompt_tokens == read
    assert parse_usage({"input_tokens": value, "prompt_tokens": "odd"}).prompt_tokens == read


@pytest.mark.parametrize("prompt", [7, 0, -1, 1.0, True, None, "7", MAX_TOKENS, MAX_TOKENS - 1])
@pytest.mark.parametrize("output", [5, 0, True, 10**30])
@pytest.mark.parametrize("total", [12, 5, 0, None])
def test_a_plain_report_reads_as_any_other(prompt: Any, output: Any, total: Any) -> None:
    plain = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": total}
    assert parse_usage(plain) == parse_usage({**plain, "of_no_meaning": 1})


def test_parts_are_never_more_than_their_whole() -> None:
    """A broken report is paid for as many tokens as it says in all."""
    details = {"cached_tokens": 600, "cache_write_tokens": 400, "audio_tokens": 900, "image_tokens": 900}
    usage = openai(1000, 100, prompt_tokens_details=details, completion_tokens_details={"audio_tokens": 10**9})
    buckets = buckets_of(parse_usage(usage))
    assert (buckets.prompt_tokens, buckets.cached_tokens, buckets.written_tokens) == (1000, 600, 400)
    assert (buckets.audio_output_tokens, buckets.output_tokens) == (100, 0)


def test_a_report_of_the_answer_alone_keeps_the_earlier_prompt() -> None:
    start = parse_usage({"input_tokens": 100, "cache_read_input_tokens": 900, "output_tokens": 1})
    both = parse_usage({"output_tokens": 50}).after(start)
    assert (both.prompt_tokens, both.cached_tokens, both.output_tokens) == (1000, 900, 50)


@pytest.mark.parametrize("later", [None, {}, {"prompt_tokens": 0, "completion_tokens": 0}, {"odd": 1}, "odd"])
def test_a_report_that_says_nothing_leaves_the_earlier_one(later: Any) -> None:
    earlier = openai(10, 5, cost=0.1)
    assert combine_usage(earlier, later) is earlier


def test_a_report_of_both_halves_takes_the_place_of_the_earlier_one() -> None:
    later = openai(10, 7)
    assert combine_usage(openai(10, 5), later) is later
    assert combine_usage(None, later) is later
    assert combine_usage(None, None) is None


def test_two_halves_of_a_report_are_one_that_reads_as_both() -> None:
    first = {
        "prompt_tokens": 100,
        "prompt_tokens_details": {"cached_tokens": 60, "cached_tokens_details": {"audio_tokens": 5}, "audio_tokens": 9},
        "cache_creation": {"ephemeral_1h_input_tokens": 7},
    }
    last = {"completion_tokens": 50, "completion_tokens_details": {"reasoning_tokens": 20}}
    whole = combine_usage(first, last)
    assert parse_usage(whole) == parse_usage(last).after(parse_usage(first))
    assert isinstance(whole, dict)
    assert (whole["prompt_tokens"], whole["completion_tokens"], whole["total_tokens"]) == (100, 50, 150)


@pytest.mark.parametrize("cost", [None, 0.0, 1.25e-7, 9_000.000_000_000_001, 1e13])
def test_a_record_is_plain_json_of_all_its_fields(cost: float | None) -> None:
    """Processes of an earlier version may read it. A cost of 1e13 is more picodollars than 64 bits hold."""
    usage = (10, None, 5, None, cost, 1.5, 0.5)
    record = UsageRecord("dec-1", 1.7e9 + 0.1, "größe", "k", "scored", "complete", *usage, tags=("a",))
    assert json.loads(record.to_json()) == {**asdict(record), "tags": ["a"], "cost_picousd": record.cost_picousd}


def test_an_answer_of_a_profiling_job_is_billed_like_any_other() -> None:
    usage = openai(1000, 100, 1600, completion_tokens_details={"reasoning_tokens": 500}, cached_tokens=800)
    completion = {"choices": [{"message": {"content": "hi"}}], "usage": usage}
    answer = read_answer(completion, 1.0, "m")
    assert answer.output_tokens == 600
    assert cost_of_answer(answer, PRICE, 9.0) == pytest.approx(200e-6 + 80e-6 + 2400e-6)


def test_zeros_beside_an_answer_of_a_profiling_job_are_no_report() -> None:
    answer = read_answer({"choices": [{"message": {"content": "hi"}}], "usage": openai(0, 0)}, 1.0, "m")
    assert cost_of_answer(answer, PRICE, 9.0) == 9.0


def test_a_price_is_listed_with_its_tiers_for_long_prompts() -> None:
    price = {"input_cost_per_token": 1.25e-6, "input_cost_per_token_above_200k_tokens": 2.5e-6}
    assert per_million(price, "input_cost_per_token") == "1.25, 2.5 above 200k"
    assert per_million(price, "output_cost_per_token") == "unknown"
