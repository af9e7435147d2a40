"""Who may answer, and what the others are told."""

import pytest

from router_core.eligibility import eligible
from router_core.errors import MapMismatch
from router_core.pool import Pool
from router_core.profiles import Profile
from router_core.types import FREE, Capabilities, Needs
from tests.router_core.makers import a_candidate, a_map, a_pool


def test_a_model_without_a_price_is_not_free() -> None:
    left = eligible(a_pool(a_candidate("priced"), a_candidate("unpriced", price=None)), Needs())
    assert left.names == ("priced",)
    assert "price" in left.why["unpriced"]


def test_unprofiled_and_unhealthy_models_are_left_out_with_their_own_reason() -> None:
    left = eligible(a_pool(a_candidate("new", errors=None), a_candidate("down", healthy=False)), Needs())
    assert left.names == ()
    assert left.why == {"new": "not profiled on this cluster map", "down": "unhealthy"}


def test_an_allow_list_leaves_only_its_own_and_ignores_strangers() -> None:
    left = eligible(a_pool(a_candidate("a"), a_candidate("b")), Needs(), allowed=["b", "stranger"])
    assert left.names == ("b",)


def test_a_prompt_longer_than_the_window_rules_the_model_out() -> None:
    small = a_candidate("small", capabilities=Capabilities(max_input_tokens=1000))
    left = eligible(a_pool(small, a_candidate("unlimited")), Needs(prompt_tokens=1001))
    assert left.names == ("unlimited",)
    assert "1001" in left.why["small"]


def test_an_answer_longer_than_the_model_can_write_rules_it_out() -> None:
    short = a_candidate("short", capabilities=Capabilities(max_output_tokens=100))
    assert eligible(a_pool(short), Needs(max_output_tokens=101)).names == ()
    assert eligible(a_pool(short), Needs(max_output_tokens=100)).names == ("short",)


@pytest.mark.parametrize("need", ["tools", "vision", "audio", "json_schema"])
def test_a_model_known_to_lack_an_ability_never_gets_the_request(need: str) -> None:
    unable = a_candidate("unable", capabilities=Capabilities(**{need: False}))
    assert eligible(a_pool(unable), Needs(**{need: True})).names == ()
    assert eligible(a_pool(unable), Needs()).names == ("unable",)


def test_an_unknown_ability_is_trusted_only_while_nobody_is_known_to_have_it() -> None:
    unknown, able = a_candidate("unknown"), a_candidate("able", capabilities=Capabilities(vision=True))
    assert eligible(a_pool(unknown), Needs(vision=True)).names == ("unknown",)
    assert eligible(a_pool(unknown, able), Needs(vision=True)).names == ("able",)


def test_an_able_model_that_is_already_ruled_out_does_not_count_against_the_unknown() -> None:
    able = a_candidate("able", price=None, capabilities=Capabilities(vision=True))
    assert eligible(a_pool(a_candidate("unknown"), able), Needs(vision=True)).names == ("unknown",)


def test_a_profile_of_another_map_is_refused_when_the_pool_is_built() -> None:
    foreign = Profile.from_json({"map": "elsewhere", "errors": [0.1] * 3, "labels": [1.0] * 3})
    candidate = a_candidate("model")
    stranger = type(candidate)("stranger", foreign, FREE)
    with pytest.raises(MapMismatch, match=r"stranger.*elsewhere"):
        Pool.build([candidate, stranger], a_map())
