import numpy as np
import pytest

from router_core import Router
from router_core.embedding import StaticEmbedder
from router_core.errors import InvalidInput, InvalidProfile, MapMismatch, NoEligibleModel
from router_core.profiles import Profile
from tests.router_core.makers import FirstLetterEmbedder, a_map, a_profile


def a_router(**mappings: dict[str, object]) -> Router:
    router = Router(cluster_map=a_map(), embedder=FirstLetterEmbedder())
    router.model_profile = mappings.get("model_profile", {"m1": [0.1, 0.5, 0.3], "m2": [0.4, 0.2, 0.3]})  # type: ignore[assignment]
    router.cost_by_model = mappings.get("cost_by_model", {"m1": 0.5, "m2": 0.1})  # type: ignore[assignment]
    return router


def test_the_router_chooses_by_the_formula() -> None:
    chosen, score, scores = a_router().route("a prompt", lambda_=0.4)
    assert chosen == "m1"
    assert score == pytest.approx(0.3)
    assert scores == pytest.approx({"m1": 0.1 + 0.4 * 0.5, "m2": 0.4 + 0.4 * 0.1})


def test_a_decision_unpacks_to_its_attributes() -> None:
    decision = a_router().route("b prompt")
    assert (decision.chosen, decision.score, decision.scores) == tuple(decision)


def test_profiles_and_costs_may_be_assigned_at_any_time() -> None:
    router = a_router()
    router.cost_by_model = {"m1": 5.0, "m2": 0.1}
    assert router.route("a prompt").chosen == "m2"
    router.model_profile = {**router.model_profile, "m3": np.zeros(3)}
    router.cost_by_model = {**router.cost_by_model, "m3": 0.0}
    assert router.route("a prompt").chosen == "m3"


def test_candidates_can_be_restricted() -> None:
    assert a_router().route("a prompt", ["m2"]).chosen == "m2"


def test_measured_profiles_and_plain_rates_may_be_mixed() -> None:
    router = a_router(model_profile={"m1": a_profile([0.0, 1.0, 1.0]), "m2": [0.5, 0.5, 0.5]})
    assert router.route("a prompt", lambda_=0.0).scores == pytest.approx({"m1": 0.0, "m2": 0.5}, abs=1e-9)


def test_bad_input_is_refused_with_its_name() -> None:
    with pytest.raises(NoEligibleModel, match="model_profile"):
        Router(cluster_map=a_map(), embedder=FirstLetterEmbedder()).route("a")
    with pytest.raises(InvalidInput, match="stranger"):
        a_router().route("a", ["stranger"])
    with pytest.raises(InvalidInput, match="cost of m2"):
        a_router(cost_by_model={"m1": 0.5}).route("a")
    with pytest.raises(InvalidProfile, match=r"m1.*3 error rates"):
        a_router(model_profile={"m1": [0.1, 0.2]}).route("a")
    foreign = Profile.from_json({"map": "elsewhere", "errors": [0.1] * 3, "labels": [1.0] * 3})
    with pytest.raises(MapMismatch, match="m1"):
        a_router(model_profile={"m1": foreign}).route("a")


@pytest.mark.parametrize("lambda_", [-0.1, float("nan"), float("inf")])
def test_a_lambda_must_be_finite_and_not_negative(lambda_: float) -> None:
    with pytest.raises(InvalidInput, match="lambda_"):
        a_router().route("a", lambda_=lambda_)


def test_a_map_and_an_embedder_that_do_not_belong_together_are_refused(embedder: StaticEmbedder) -> None:
    with pytest.raises(MapMismatch, match="first-letter"):
        Router(cluster_map=a_map(), embedder=embedder)


def test_the_builtin_map_tells_code_from_history(embedder: StaticEmbedder) -> None:
    router = Router(embedder=embedder)
    code = np.array(["function" in name or "python" in name for name in router.cluster_map.names])
    router.model_profile = {"coder": np.where(code, 0.05, 0.6), "historian": np.full(len(code), 0.3)}
    router.cost_by_model = {"coder": 0.0, "historian": 0.0}
    assert router.route("Implement a function in Python which sorts the list").chosen == "coder"
    assert router.route("Which treaty ended the war between France and Spain?").chosen == "historian"
