from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.scripted_upstream import ScriptedUpstream


@pytest.fixture(scope="module")
def upstream() -> Iterator[ScriptedUpstream]:
    with ScriptedUpstream(lambda _: "42") as started:
        yield started
