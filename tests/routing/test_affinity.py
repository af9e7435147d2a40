from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.routing.affinity import NO_AFFINITY, Affinity, AffinityRecorder, load_affinity
from proxy.routing.chat_request import ChatRequest, RoutingOptions
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey
from proxy.storage.redis import Store
from proxy.storage.sessions import SessionStore

ASK: Any = {"role": "user", "content": "What is the weather?"}
CALL: Any = {
    "role": "assistant",
    "content": None,
    "reasoning_content": "The user wants to know how it is outside. " * 10,
    "tool_calls": [{"id": "call_0", "type": "function", "function": {"name": "weather", "arguments": '{"at":"here"}'}}],
}
RESULT: Any = {"role": "tool", "tool_call_id": "call_0", "content": "Rain."}
FIRST, SECOND = (ClientKey(name, name, "digest", 0.0) for name in ("k1", "k2"))


@pytest.fixture
def memory(store: Store) -> SessionStore:
    return SessionStore(store, 60)


async def affinity_of(
    memory: SessionStore,
    *messages: Any,
    key: ClientKey | None = None,
    session: str | None = None,
    mode: str = "auto",
    agent: str | None = None,
    housekeeping: str | None = None,
) -> Affinity:
    options = RoutingOptions(session=session, agent=agent)
    request = ChatRequest({"messages": list(messages)}, "auto", False, False, options, housekeeping=housekeeping)
    return await load_affinity(memory, request, key, Settings.model_validate({"sticky_sessions": mode}))


async def answered(
    memory: SessionStore, *messages: Any, answer: Any = CALL, model: str = "small", **options: Any
) -> AffinityRecorder:
    recorder = AffinityRecorder(memory, await affinity_of(memory, *messages, **options), list(messages))
    recorder.observe_completion({"choices": [{"index": 0, "message": answer, "finish_reason": "tool_calls"}]}, model)
    recorder.commit(model, 70)
    return recorder


async def test_the_next_turn_of_a_loop_knows_who_called(memory: SessionStore) -> None:
    await answered(memory, ASK)
    assert await affinity_of(memory, ASK, CALL, RESULT) == Affinity(has_reasoning=True, producer="small")
    bare = {name: value for name, value in CALL.items() if name != "reasoning_content"}
    assert await affinity_of(memory, ASK, bare, RESULT) == Affinity(producer="small")
    assert (await affinity_of(memory, {**ASK, "content": "Another question?"}, bare, RESULT)).producer is None


async def test_two_conversations_with_the_same_counted_ids_are_not_mixed(memory: SessionStore) -> None:
    bare = {name: value for name, value in CALL.items() if name != "reasoning_content"}
    other = {**ASK, "content": "And is it cold?"}
    await answered(memory, ASK, answer=bare, model="small")
    await answered(memory, other, answer=bare, model="large")
    assert (await affinity_of(memory, ASK, bare, RESULT)).producer == "small"
    assert (await affinity_of(memory, other, bare, RESULT)).producer == "large"


async def test_another_key_recalls_nothing_of_ours(memory: SessionStore) -> None:
    await answered(memory, ASK, key=FIRST, session="mine")
    ours = await affinity_of(memory, ASK, key=FIRST, session="mine")
    assert ours.last_turn is not None
    assert (ours.last_turn.model, ours.last_turn.tokens) == ("small", 70)
    for stranger in (SECOND, None):
        assert (await affinity_of(memory, ASK, key=stranger, session="mine")).last_turn is None
        assert (await affinity_of(memory, ASK, CALL, RESULT, key=stranger)).producer is None
    assert (await affinity_of(memory, ASK, CALL, RESULT, key=FIRST)).producer == "small"


async def test_with_sessions_off_nothing_of_them_is_read_or_written(memory: SessionStore, store: Store) -> None:
    await answered(memory, ASK, answer={"role": "assistant", "content": "Rain."}, session="mine", mode="off")
    await memory.flush()
    assert await store.client.keys("uniroute:conversation:*") == []
    await answered(memory, ASK, session="mine")
    assert (await affinity_of(memory, ASK, session="mine", mode="off")).last_turn is None
    assert (await affinity_of(memory, ASK, CALL, RESULT, mode="off")).producer == "small"


async def test_a_stream_is_remembered_with_its_last_piece_before_its_usage(memory: SessionStore) -> None:
    recorder = AffinityRecorder(memory, NO_AFFINITY, [ASK])
    pieces: list[Any] = [
        {"delta": {"role": "assistant", "reasoning_content": CALL["reasoning_content"][:50]}},
        {"delta": {"reasoning_content": CALL["reasoning_content"][50:]}},
        {"delta": {"tool_calls": [{"index": 0, **CALL["tool_calls"][0]}]}},
        {"delta": {}, "finish_reason": "tool_calls"},
    ]
    for piece in pieces[:3]:
        recorder.observe({"choices": [{"index": 0, **piece}]}, "small")
    assert (await affinity_of(memory, ASK, CALL, RESULT)).producer is None
    recorder.observe({"choices": [{"index": 0, **pieces[3]}]}, "small")
    assert (await affinity_of(memory, ASK, CALL, RESULT)).producer == "small"


async def test_every_answer_of_several_is_remembered(memory: SessionStore) -> None:
    recorder = AffinityRecorder(memory, NO_AFFINITY, [ASK])
    texts = ["One way to think about it. " * 10, "Another way to think about it. " * 10]
    messages = [{"role": "assistant", "content": "Yes.", "reasoning_content": text} for text in texts]
    recorder.observe_completion(
        {"choices": [{"index": place, "message": one} for place, one in enumerate(messages)]}, "small"
    )
    assert [(await affinity_of(memory, ASK, one, ASK)).producer for one in messages] == ["small", "small"]


async def test_a_session_id_is_stored_nowhere_in_clear(memory: SessionStore, store: Store) -> None:
    recorder = await answered(memory, ASK, session="canary-session")
    await memory.flush()
    keys = await store.client.keys("*")
    assert keys
    stored = [*keys, *[await store.client.get(key) for key in keys], repr(recorder._affinity), *memory._local]
    assert not [text for text in stored if "canary" in str(text) or "call_0" in str(text)]


@pytest.mark.parametrize("index", [None, "0", [], {}])
async def test_an_odd_index_of_an_answer_is_its_place(memory: SessionStore, index: Any) -> None:
    recorder = AffinityRecorder(memory, NO_AFFINITY, [ASK])
    recorder.observe_completion({"choices": [{"index": index, "message": CALL}]}, "small")
    assert (await affinity_of(memory, ASK, CALL, RESULT)).producer == "small"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["choices", "index", "delta", "message", "finish_reason", "content"]), inner)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["choices", "usage"]), JSON), JSON)
def test_no_chunk_makes_it_fail(chunk: dict[str, Any], message: Any) -> None:
    memory = SessionStore(Store("unix:///nowhere"), 60)
    recorder = AffinityRecorder(memory, NO_AFFINITY, [message])
    recorder.observe(chunk, "small")
    recorder.observe_completion(chunk, "small")
    recorder.commit("small", None)


async def test_each_agent_of_a_session_has_a_conversation_of_its_own(memory: SessionStore) -> None:
    await answered(memory, ASK, session="mine", model="large")
    await answered(memory, ASK, session="mine", agent="helper", model="small")
    agents = (None, "helper", "another")
    turns = [(await affinity_of(memory, ASK, session="mine", agent=agent)).last_turn for agent in agents]

    assert [turn and turn.model for turn in turns] == ["large", "small", None]


async def test_housekeeping_is_no_turn_of_its_session(memory: SessionStore) -> None:
    await answered(memory, ASK, session="mine", model="large")
    await answered(memory, ASK, session="mine", model="small", housekeeping="title")
    found = await affinity_of(memory, ASK, session="mine", housekeeping="title")

    assert found.session is None
    assert found.last_turn is not None
    assert found.last_turn.model == "large"


BADLY = "Exit code 1\n1 failed, 30 passed in 0.8s"
GIVEN_UP: Any = {"role": "assistant", "content": "I have done what I could."}
GO_ON: Any = {"role": "user", "content": "Go on."}


def failing_run(name: str, turns: int = 4) -> list[Any]:
    """Return turns whose calls have ids of their own, and fail."""
    made: list[Any] = []
    for number in range(turns):
        call_id = f"call_{name}9pw1qnYScq{number}"
        function = {"name": "bash", "arguments": f'{{"command": "pytest -k {number}"}}'}
        made.append({"role": "assistant", "tool_calls": [{"id": call_id, "function": function}]})
        made.append({"role": "tool", "tool_call_id": call_id, "content": BADLY})
    return made


async def remembered_run(memory: SessionStore, run: list[Any], model: str, **options: Any) -> None:
    for message in run[::2]:
        await answered(memory, ASK, answer=message, model=model, **options)


async def stuck_in(memory: SessionStore, *messages: Any, **more: Any) -> dict[str, float]:
    options = RoutingOptions(session=more.pop("session", None))
    body = {"messages": list(messages), "tools": [{}], **more.pop("body", {})}
    request = ChatRequest(body, "auto", False, False, options)
    return dict((await load_affinity(memory, request, None, Settings.model_validate(more))).stuck)


async def test_a_stuck_run_is_that_of_the_model_that_made_its_calls(memory: SessionStore) -> None:
    run = failing_run("a")
    await remembered_run(memory, run, "small")
    at_work = await stuck_in(memory, ASK, *run)
    gone_on = await stuck_in(memory, ASK, *run, GIVEN_UP, GO_ON)
    assert at_work == gone_on == {"small": pytest.approx((1 - 0.7**4 - 0.25) / 0.75)}


async def test_each_of_several_models_has_its_share_of_what_is_stuck(memory: SessionStore) -> None:
    first, second = failing_run("a"), failing_run("b", 2)
    await remembered_run(memory, first, "small")
    await remembered_run(memory, second, "large")
    found = await stuck_in(memory, ASK, *first, GIVEN_UP, GO_ON, *second, GIVEN_UP, GO_ON)
    assert sum(found.values()) == pytest.approx((1 - 0.7**6 - 0.25) / 0.75)
    assert found["large"] / found["small"] == pytest.approx((1 - 0.7**2) / (0.7**2 * (1 - 0.7**4)))


async def test_a_session_tells_who_made_the_newest_run_and_no_other(memory: SessionStore) -> None:
    await answered(memory, ASK, answer=GIVEN_UP, model="small", session="mine")
    run = failing_run("a")
    assert set(await stuck_in(memory, ASK, *run, GIVEN_UP, GO_ON, session="mine")) == {"small"}
    assert await stuck_in(memory, ASK, *run, GIVEN_UP, GO_ON, GIVEN_UP, GO_ON, session="mine") == {}


async def test_a_run_of_which_nobody_is_known_to_have_made_it_is_nobodys(memory: SessionStore) -> None:
    assert await stuck_in(memory, ASK, *failing_run("a"), GIVEN_UP, GO_ON) == {}


async def test_another_process_knows_who_made_it_too(memory: SessionStore, store: Store) -> None:
    run = failing_run("a")
    await remembered_run(memory, run, "small")
    await memory.flush()
    assert set(await stuck_in(SessionStore(store, 60), ASK, *run, GIVEN_UP, GO_ON)) == {"small"}


@pytest.mark.parametrize("more", [{"trajectory": "off"}, {"body": {"tools": None}}], ids=["off", "no tools"])
async def test_without_tools_and_where_it_is_off_no_run_is_looked_at(
    memory: SessionStore, more: dict[str, Any]
) -> None:
    run = failing_run("a")
    await remembered_run(memory, run, "small")
    body = {"messages": [ASK, *run, GIVEN_UP, GO_ON], **({} if "body" in more else {"tools": [{}]})}
    request = ChatRequest(body, "auto", False, False, RoutingOptions())
    settings = Settings.model_validate({name: value for name, value in more.items() if name != "body"})
    assert await load_affinity(memory, request, None, settings) == NO_AFFINITY
