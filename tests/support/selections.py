from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from proxy.routing.assigner import ClusterAssigner
from proxy.routing.chat_request import ChatRequest, RoutingOptions
from proxy.routing.selection import Selection, select_model
from proxy.routing.selection_context import SelectionContext
from proxy.settings.schema import Settings
from proxy.storage.client_keys import ClientKey
from proxy.storage.records import StoredProfile
from proxy.storage.snapshot import RoutingSnapshot, build_state
from proxy.storage.state_reader import StoredState
from router_core.types import Floats
from tests.support.makers import a_profile, a_record, snapshot_inputs

LONG = "A question that is long enough to be read without the turns before it, that is."
LIMITED_KEY = ClientKey("k1", "limited", "digest", 0.0, ("dear",))


def only_unmeasured(**info: Any) -> RoutingSnapshot:
    priced = {"input_cost_per_token": 1e-7, "output_cost_per_token": 1e-7}
    record = a_record("new", info={**priced, **info})
    return build_state(
        StoredState(version=1, models={"new": record}, keys_exist=False), snapshot_inputs(), keys_latched=False
    )


class Corners:
    """Embed every text in the first corner. `hold` keeps it from answering."""

    id = "corners"
    dimension = 4

    def __init__(self) -> None:
        self.free = threading.Event()
        self.free.set()

    def embed(self, texts: Sequence[str]) -> Floats:
        self.free.wait(60)
        if texts == ["broken"]:
            raise ValueError("no such text")
        return np.tile(np.eye(4, dtype=np.float32)[0], (len(texts), 1))


def a_state(**abilities: Any) -> RoutingSnapshot:
    """Build three models. cheap: 30 % errors at a five-hundredth of the price; dear: 10 %; unmeasured: neither."""
    prices = {"cheap": 1e-7, "dear": 5e-5, "unmeasured": 1e-7}
    records = {
        name: a_record(
            name, info={"input_cost_per_token": price, "output_cost_per_token": price, **abilities.get(name, {})}
        )
        for name, price in prices.items()
    }
    errors = {"cheap": 0.3, "dear": 0.1}
    profiles = {
        name: StoredProfile(records[name].fingerprint, a_profile([error] * 4)) for name, error in errors.items()
    }
    stored = StoredState(version=1, models=records, profiles=profiles, keys_exist=False)
    return build_state(stored, snapshot_inputs(), keys_latched=False)


async def chosen(
    model: str = "auto",
    text: str = LONG,
    *,
    key: ClientKey | None = None,
    state: RoutingSnapshot | None = None,
    assigner: ClusterAssigner | None = None,
    settings: dict[str, Any] | None = None,
    explain: bool = False,
    body: dict[str, Any] | None = None,
    housekeeping: str | None = None,
    **options: Any,
) -> Selection:
    content = {"messages": [{"role": "user", "content": text}], **(body or {})}
    request = ChatRequest(content, model, False, False, RoutingOptions(**options), housekeeping=housekeeping)
    found = Settings.model_validate({"data_dir": Path("/nowhere"), **(settings or {})})
    ctx = SelectionContext("dec-1", request, key, state or a_state(), found)
    return await select_model(ctx, assigner or ClusterAssigner(Corners(), 1.0), explain=explain)
