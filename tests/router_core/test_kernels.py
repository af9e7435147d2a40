from __future__ import annotations

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hatch_build import CannotCompile, compile_kernels
from router_core import kernels
from router_core.artifact import BUILTIN_MAP, load_map
from router_core.clustering import ClusterMap
from router_core.eligibility import eligible
from router_core.embedding import static_embedder
from router_core.errors import NoEligibleModel
from router_core.kernels import NUMPY, SOURCE, Kernels, ScoringTerms, TokenTable, argmin_with_ties
from router_core.pool import Candidate, Pool
from router_core.profiles import Profile
from router_core.scoring import ScoringParams, rank, rank_by_cost, rank_by_mean
from router_core.text import truncate_middle
from router_core.types import Capabilities, Doubles, Floats, Price, Requirements
from router_core.validation.families.registry import builtin_validation_set
from tests.support.compiled_kernels import BOTH, compiled_kernels, kernels_named, load_kernels, using
from tests.test_house import ROOT

SEEDS = st.integers(0, 2**32 - 1)
# Where the sanitizers watch, as many as take half a minute.
FUZZED = 5000 if "UNIROUTE_TEST_KERNELS" in os.environ else 250
REFUSALS = (TypeError, ValueError, IndexError, BufferError)


@pytest.fixture(params=BOTH)
def each(request: pytest.FixtureRequest) -> Kernels:
    return kernels_named(request.param)


def unit(vector: Floats) -> Floats:
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)


def test_a_vector_is_the_sum_of_its_rows_at_unit_length(each: Kernels) -> None:
    rows = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    ids, out = np.array([3, 3, 49, 0], dtype=np.uint32), np.empty((1, 7), dtype=np.float32)
    each.token_table(rows).embed(ids, out)

    assert out[0] == pytest.approx(unit(rows[ids].sum(axis=0)), abs=1e-6)
    each.token_table(rows).embed(ids[:0], out)
    assert not out.any()


@given(SEEDS, st.integers(1, 40), st.integers(2, 400), st.sampled_from([0, 1, 3, 4, 5, 255, 256, 257, 600]))
@settings(max_examples=60)
def test_both_kernels_embed_to_the_same_bits(seed: int, tokens: int, dimension: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(tokens, dimension)) * rng.choice([0, 1e-30, 1, 1e10])).astype(np.float32)
    ids = rng.integers(tokens, size=count).astype(np.uint32)
    found = [np.full((1, dimension), 9, dtype=np.float32) for _ in range(2)]
    for kernel, out in zip((NUMPY, compiled_kernels()), found, strict=True):
        kernel.token_table(rows).embed(ids, out)
    assert found[0].tobytes() == found[1].tobytes()


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40), st.floats(0.001, 10))
def test_both_kernels_weigh_clusters_to_the_same_bits(cosines: list[float], temperature: float) -> None:
    ordered: Any = np.array(sorted(cosines, reverse=True), dtype=np.float32)
    nearest = memoryview(ordered)
    weights = NUMPY.softmax(nearest, temperature)

    assert weights == compiled_kernels().softmax(nearest, temperature)
    assert np.frombuffer(weights, dtype=np.float32).sum() == pytest.approx(1.0, abs=1e-5)


def some_columns(rng: np.random.Generator, clusters: int, models: int) -> dict[str, Any]:
    """Draw the columns of a pool, some models of which are alike, or lack a profile or a price."""
    errors, tokens = rng.random((clusters, models)), rng.uniform(0, 3000, (clusters, models))
    columns: dict[str, Any] = {
        "by_cluster": np.concatenate((errors, tokens, rng.uniform(0, 30, (clusters, models))), axis=1),
        "output_caps": np.where(rng.random(models) < 0.5, float(2**63), rng.uniform(1, 3000, models)),
        **{name: rng.uniform(0, 1e-5, models) for name in ("input_price", "output_price", "cached_price")},
        "profiled": rng.random(models) < 0.9,
    }
    twins = rng.integers(models, size=models) if rng.random() < 0.5 else np.arange(models)
    blocks = np.concatenate((twins, twins + models, twins + 2 * models))
    alike = {name: column[..., blocks if name == "by_cluster" else twins] for name, column in columns.items()}
    for name in ("input_price", "output_price", "cached_price"):
        alike[name] = np.where(rng.random(models) < 0.05, np.nan, alike[name])
    return {name: np.ascontiguousarray(column) for name, column in alike.items()}


def some_terms(rng: np.random.Generator, models: int) -> ScoringTerms:
    tokens = int(rng.choice([0, 1, 200, 100_000]))
    cached = bool(rng.random() < 0.3)
    return ScoringTerms(
        prompt_tokens=tokens,
        max_output_tokens=float(rng.choice([math.inf, math.inf, 1, 500])),
        answers=int(rng.choice([1, 1, 3])),
        cached_row=int(rng.integers(models)) if cached else -1,
        cached_tokens=int(rng.integers(tokens + 1)) if cached else 0,
        latency_weight=float(rng.choice([0, 0, 1e-4])),
        lambda_=float(rng.choice([0, 0.02, 0.1, 5, 1e12, math.inf])),
        input_reference=2.5e-6,
        output_reference=1e-5,
        unit=float(rng.choice([0, 0, 0.01])),
        tie=float(rng.choice([0, 0.005])),
    )


@given(SEEDS, st.integers(1, 300), st.sampled_from([1, 2, 3, 4, 8, 24]))
@settings(max_examples=200)
def test_both_kernels_score_and_choose_to_the_same_bits(seed: int, models: int, placed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = some_columns(rng, placed + 5, models)
    ids = rng.permutation(placed + 5)[None, :placed].astype(np.int64)
    weights = rng.random((1, placed)).astype(np.float32)
    weights /= weights.sum()
    rows = np.flatnonzero(rng.random(models) < 0.7) if rng.random() < 0.5 else None
    if rows is not None and not rows.size:
        rows = None
    terms = some_terms(rng, models)
    doubts = np.where(rng.random(models) < 0.8, 0.0, rng.random(models)) if rng.random() < 0.5 else None
    (numpy_choice, figures), (choice, packed) = (
        kernel.scorer(**columns).choose(ids, weights, rows, terms, doubts) for kernel in (NUMPY, compiled_kernels())
    )

    assert choice == numpy_choice
    assert packed == b"".join(column.tobytes() for column in figures)  # type: ignore[union-attr]


@given(st.lists(st.sampled_from([0.0, 0.1, 0.1049, 0.105, 0.3, math.nan]), min_size=1, max_size=8), SEEDS)
def test_of_those_near_the_best_the_cheapest_is_chosen_and_of_equals_the_first(scores: list[float], seed: int) -> None:
    costs = np.random.default_rng(seed).choice([0.0, 1.0, 2.0], size=len(scores))
    if any(map(math.isnan, scores)):
        expected = 0  # nothing is near a best that is not known
    else:
        near = [row for row, score in enumerate(scores) if score <= min(scores) + 0.005]
        expected = min(near, key=lambda row: (costs[row], row))
    assert argmin_with_ties(np.array(scores), costs, 0.005) == expected
    assert compiled_choice(np.array(scores), costs, 0.005) == expected


def compiled_choice(scores: Doubles, costs: Doubles, tie: float) -> int:
    """Choose with one cluster, at λ = 0 and prices that are the costs."""
    models = len(scores)
    scorer = compiled_kernels().scorer(
        by_cluster=np.concatenate((scores, np.ones(models)))[None, :],
        output_caps=np.ones(models),
        input_price=costs,
        output_price=np.zeros(models),
        cached_price=costs,
        profiled=np.ones(models, dtype=np.bool_),
    )
    terms = ScoringTerms(1, math.inf, 1, -1, 0, 0.0, 0.0, 1.0, 1.0, 1.0, tie)
    return scorer.choose(np.zeros((1, 1), dtype=np.int64), np.ones((1, 1), dtype=np.float32), None, terms)[0]


def a_large_pool(cluster_map: ClusterMap, models: int) -> Pool:
    rng = np.random.default_rng(models)
    candidates = []
    for number in range(models):
        measured = {"errors": rng.uniform(size=cluster_map.size).tolist(), "labels": [2.0] * cluster_map.size}
        lengths = {"mean_output_tokens": rng.uniform(20, 2000), "mean_seconds": rng.uniform(0.2, 20)}
        profile = Profile.from_json({"map": cluster_map.id, **measured, **lengths})
        tiers = ((4000, Price(2e-6, 2e-5)),) if number % 7 == 0 else ()
        price = Price(float(rng.uniform(0, 1e-5)), float(rng.uniform(0, 1e-5)), 1e-8, tiers=tiers)
        able = Capabilities(max_output_tokens=500 if number % 3 == 0 else None)
        candidates.append(
            Candidate(f"m{number:04}", profile if number % 11 else None, price if number % 13 else None, able)
        )
    return Pool.build(candidates, cluster_map)


REQUESTS = [
    (Requirements(prompt_tokens=200), ScoringParams()),
    (
        Requirements(prompt_tokens=9000, max_output_tokens=100, answers=2),
        ScoringParams(lambda_=0.0, latency_weight=1e-4),
    ),
    (Requirements(prompt_tokens=50), ScoringParams(lambda_=1e12, cost_unit="cents", cached=("m0005", 40))),
    (Requirements(prompt_tokens=50, max_output_tokens=1), ScoringParams(max_cost_usd=1e-4, tie=0.0)),
    (Requirements(prompt_tokens=200), ScoringParams(doubts=(("m0001", 0.5), ("m0004", 0.9), ("absent", 0.9)))),
]


def routes(kernel: Kernels, folder: Path, texts: list[str], models: int) -> list[tuple[object, ...]]:
    """Return for each text the bits of its vector and clusters, and what one of the requests chooses."""
    with using(kernel):
        embedder, cluster_map = static_embedder(folder), load_map(BUILTIN_MAP)
        pool = a_large_pool(cluster_map, models)
        found = list[tuple[object, ...]]()
        for number, text in enumerate(texts):
            vector = embedder.embed([text])
            placed = cluster_map.assign(vector)
            needs, params = REQUESTS[number % len(REQUESTS)]
            decide = rank_by_cost if number % 5 == 0 else rank
            try:
                decision = decide(eligible(pool, needs, cooling_down=["m0003"]), placed, needs, params)
            except NoEligibleModel as error:
                chosen: tuple[object, ...] = (str(error),)
            else:
                chosen = (decision.chosen, decision.table.scores.tobytes())
            found.append((vector.tobytes(), placed.ids.tobytes(), placed.weights.tobytes(), *chosen))
        return found


def test_every_validation_prompt_is_routed_alike_by_both_kernels(embedder_cache: Path) -> None:
    texts = [truncate_middle(prompt.text) for prompt in builtin_validation_set()]
    texts += ["", "?!", "Ünïcödé 漢字 \U0001f600", "half \ud800 a character", "word " * 1500]
    assert routes(NUMPY, embedder_cache, texts, 20) == routes(compiled_kernels(), embedder_cache, texts, 20)


def test_a_thousand_models_are_ranked_alike_by_both_kernels(embedder_cache: Path) -> None:
    texts = [prompt.text for prompt in builtin_validation_set()][:20]
    assert routes(NUMPY, embedder_cache, texts, 1000) == routes(compiled_kernels(), embedder_cache, texts, 1000)


def test_without_clusters_both_kernels_rank_by_the_mean() -> None:
    def ranked(kernel: Kernels) -> tuple[str, ...]:
        with using(kernel):
            pool = a_large_pool(load_map(BUILTIN_MAP), 30)
        return tuple(rank_by_mean(eligible(pool, Requirements()), Requirements(), ScoringParams()).ranking)

    assert ranked(NUMPY) == ranked(compiled_kernels())


def a_table() -> Any:
    return compiled_kernels().token_table(np.ones((5, 4), dtype=np.float32))


def a_scorer(models: int = 3) -> Any:
    return compiled_kernels().scorer(**some_columns(np.random.default_rng(0), 4, models))


TERMS = ScoringTerms(1, math.inf, 1, -1, 0, 0.0, 0.1, 1.0, 1.0, 0.0, 0.0)
OUT = np.zeros((1, 4), dtype=np.float32)
FOUR = np.zeros((1, 4), dtype=np.int64)
QUARTERS = np.full((1, 4), 0.25, dtype=np.float32)


@pytest.mark.parametrize(
    ("ids", "out"),
    [
        (np.array([5], dtype=np.uint32), OUT),
        (np.array([2**32 - 1], dtype=np.uint32), OUT),
        (np.array([0], dtype=np.int64), OUT),
        (np.zeros((1, 1), dtype=np.uint32), OUT),
        (np.zeros(8, dtype=np.uint32)[::2], OUT),
        (np.zeros(1, dtype=np.uint32), OUT[:, :3]),
        (np.zeros(1, dtype=np.uint32), np.zeros((1, 4))),
        (np.zeros(1, dtype=np.uint32), np.frombuffer(bytes(16), dtype=np.float32)),
        ([0], OUT),
        (np.zeros(1, dtype=np.uint32), None),
    ],
)
def test_ids_and_arrays_that_do_not_fit_are_refused(ids: Any, out: Any) -> None:
    with pytest.raises(REFUSALS):
        a_table().embed(ids, out)


@pytest.mark.parametrize(
    ("ids", "weights", "rows", "terms"),
    [
        (np.array([[0, 1, 2, 4]]), QUARTERS, None, TERMS),
        (np.array([[0, 1, 2, -1]]), QUARTERS, None, TERMS),
        (FOUR, QUARTERS[:, :3], None, TERMS),
        (FOUR.astype(np.int32), QUARTERS, None, TERMS),
        (FOUR, QUARTERS.astype(np.float64), None, TERMS),
        (FOUR, QUARTERS, np.array([3]), TERMS),
        (FOUR, QUARTERS, np.array([-1]), TERMS),
        (FOUR, QUARTERS, np.array([[0]]), TERMS),
        (FOUR, QUARTERS, np.array([], dtype=np.int64), TERMS),
        (FOUR, QUARTERS, [0], TERMS),
        (FOUR, QUARTERS, None, TERMS[:-1]),
        (FOUR, QUARTERS, None, list(TERMS)),
        (FOUR, QUARTERS, None, TERMS._replace(cached_row=3)),
        (FOUR, QUARTERS, None, TERMS._replace(cached_row=math.nan)),  # type: ignore[arg-type]
        (FOUR, QUARTERS, None, TERMS._replace(cached_row=-(2**80))),
        (FOUR, QUARTERS, None, TERMS._replace(tie="x")),  # type: ignore[arg-type]
    ],
)
def test_clusters_rows_and_terms_that_do_not_fit_are_refused(ids: Any, weights: Any, rows: Any, terms: Any) -> None:
    with pytest.raises(REFUSALS):
        a_scorer().choose(ids, weights, rows, terms)


@pytest.mark.parametrize(
    "doubts", [np.zeros(2), np.zeros(4), np.zeros(3, dtype=np.float32), np.zeros((1, 3)), np.zeros(6)[::2], [0.0] * 3]
)
def test_doubts_that_do_not_fit_are_refused(doubts: Any) -> None:
    with pytest.raises(REFUSALS):
        a_scorer().choose(FOUR, QUARTERS, None, TERMS, doubts)


@pytest.mark.parametrize(
    "name", ["by_cluster", "output_caps", "input_price", "output_price", "cached_price", "profiled"]
)
def test_columns_of_another_length_or_type_are_refused(name: str) -> None:
    columns = some_columns(np.random.default_rng(0), 4, 3)
    whole = columns[name]
    for broken in (whole[..., :-1], whole[..., ::-1], whole.astype(np.float32), whole.tolist(), whole[None]):
        with pytest.raises(REFUSALS):
            compiled_kernels().scorer(**{**columns, name: broken})
    with pytest.raises(ValueError, match="needs the column"):
        compiled_kernels().scorer(**{**columns, "by_cluster": columns["by_cluster"][:, :6].copy()}).choose(
            FOUR, QUARTERS, None, TERMS._replace(latency_weight=1.0)
        )


KINDS: list[Any] = ["uint32", "int64", "float32", "float64", "bool", "uint8", "float16", "complex64", ">f4"]


@st.composite
def any_arrays(draw: st.DrawFn) -> Any:
    """Draw whatever may be handed in: arrays of all types and shapes, views, bytes, and no array at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from([None, b"", b"abcd", 1, "x", (), [1.0]]))
    shape = draw(st.lists(st.integers(0, 6), max_size=3))
    values = draw(st.lists(st.integers(-2, 6), min_size=1, max_size=8))
    kind = draw(st.sampled_from(KINDS))
    made: Any = np.resize(np.array(values), shape).astype(kind)
    if draw(st.booleans()) and shape:
        step = draw(st.sampled_from([-1, 1, 2]))
        made = made[draw(st.integers(0, 1)) :: step]
    if draw(st.booleans()):
        made.setflags(write=False)
    return made


@given(any_arrays(), any_arrays(), any_arrays(), any_arrays(), SEEDS)
@settings(max_examples=FUZZED)
def test_whatever_is_handed_in_is_computed_or_refused(ids: Any, other: Any, rows: Any, number: Any, seed: int) -> None:
    made = compiled_kernels()
    columns = some_columns(np.random.default_rng(seed), 4, 3)
    broken = {**columns, list(columns)[seed % len(columns)]: number}
    terms = TERMS._replace(cached_row=seed % 5 - 1)
    attempts = (
        lambda: made.token_table(other).embed(ids, np.zeros(4, dtype=np.float32)),
        lambda: made.token_table(np.ones((3, 4), dtype=np.float32)).embed(ids, other),
        lambda: made.softmax(ids, 0.05),
        lambda: made.softmax(ids, number),
        lambda: made.scorer(**columns).choose(ids, other, rows, terms),
        lambda: made.scorer(**columns).choose(ids, np.zeros(np.size(ids), dtype=np.float32), rows, terms),
        lambda: made.scorer(**broken).choose(FOUR, QUARTERS, rows, terms),
        lambda: made.scorer(**columns).choose(FOUR, QUARTERS, None, ids),
        lambda: made.scorer(**columns).choose(FOUR, QUARTERS, None, terms, number),
    )
    for attempt in attempts:
        try:
            attempt()
        except REFUSALS:
            continue


def test_threads_share_one_table_and_one_scorer() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(500, 64)).astype(np.float32)
    table, alone = compiled_kernels().token_table(rows), TokenTable(rows)
    scorer, columns = compiled_kernels().scorer, some_columns(rng, 9, 40)
    shared = scorer(**columns)
    ids = [rng.integers(500, size=rng.integers(1, 400)).astype(np.uint32) for _ in range(200)]
    places = [np.array([rng.permutation(9)[:4]]) for _ in ids]

    def work(_: int) -> list[tuple[bytes, object]]:
        found, out = list[tuple[bytes, object]](), np.empty((1, 64), dtype=np.float32)
        for tokens, place in zip(ids, places, strict=True):
            table.embed(tokens, out)
            found.append((out.tobytes(), shared.choose(place, QUARTERS, None, TERMS)))
        return found

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    expected, out = list[tuple[bytes, object]](), np.empty((1, 64), dtype=np.float32)
    for tokens, place in zip(ids, places, strict=True):
        alone.embed(tokens, out)
        expected.append((out.tobytes(), scorer(**columns).choose(place, QUARTERS, None, TERMS)))
    assert results == [expected] * 4


def test_kernels_of_another_version_of_their_source_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "_compiled.c"
    changed.write_bytes(SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(kernels, "SOURCE", changed)
    kernels.compiled.cache_clear()
    try:
        assert kernels.compiled() is None
        assert kernels.current() is NUMPY
    finally:
        kernels.compiled.cache_clear()


def test_a_pool_keeps_the_kernels_that_it_was_made_with() -> None:
    with using(NUMPY):
        pool = a_large_pool(load_map(BUILTIN_MAP), 8)
    with using(compiled_kernels()):
        later = pool.plan.scorer(5000, weighs_seconds=True, with_tools=False)
    assert isinstance(later, kernels.Scorer)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' library is loaded first, by LD_PRELOAD")
def test_the_tests_of_this_file_read_and_write_nothing_out_of_bounds(tmp_path: Path) -> None:
    """Run them over kernels that AddressSanitizer and UndefinedBehaviorSanitizer watch."""
    target = tmp_path / "_compiled.abi3.so"
    try:
        compile_kernels(SOURCE, target, ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"))
    except CannotCompile as error:
        pytest.skip(str(error))
    library = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environ = {
        **os.environ,
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UNIROUTE_TEST_KERNELS": str(target),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "not slow", __file__]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_source_that_does_not_compile_is_told_apart(tmp_path: Path) -> None:
    compiled_kernels()  # skips without a compiler
    (tmp_path / "broken.c").write_text("#error this is no C\n")
    with pytest.raises(CannotCompile, match="this is no C"):
        compile_kernels(tmp_path / "broken.c", tmp_path / "made.so")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.c"]
    with pytest.raises(ImportError):
        load_kernels(tmp_path / "made.so")
