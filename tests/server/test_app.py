from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from proxy.app import app_state, create_app
from proxy.settings.model_config import SettingsError
from proxy.settings.schema import Settings

PAGE = "https://page.example"
pytestmark = pytest.mark.filterwarnings("ignore:Item .* on TypedDict:UserWarning")


def settings(folder: Path, embedder_cache: Path, **more: object) -> Settings:
    for table in embedder_cache.glob("static-*"):
        (folder / table.name).symlink_to(table)
    return Settings.model_validate({"data_dir": folder, **more})


async def test_pages_of_allowed_origins_may_call_and_no_others(tmp_path: Path, embedder_cache: Path) -> None:
    request_headers = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,lambda",
    }
    async with app_state(settings(tmp_path, embedder_cache, allowed_origins=[PAGE]), {}) as state:
        transport = httpx.ASGITransport(app=create_app(state))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            preflight = await client.options("/v1/chat/completions", headers={"origin": PAGE, **request_headers})
            allowed = await client.get("/v1/models", headers={"origin": PAGE})
            foreign = await client.get("/v1/models", headers={"origin": "https://evil.example"})

    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, PAGE)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, PAGE)
    assert foreign.status_code == 403
    assert "access-control-allow-origin" not in foreign.headers


async def test_a_change_of_a_key_is_in_force_once_it_is_answered(tmp_path: Path, embedder_cache: Path) -> None:
    root = {"authorization": "Bearer root-key-of-the-test"}
    async with app_state(settings(tmp_path, embedder_cache, admin_key="root-key-of-the-test"), {}) as state:
        await state.snapshots.stop()  # nothing but the call itself brings the news
        transport = httpx.ASGITransport(app=create_app(state))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:

            async def opens(key: str | None) -> bool:
                headers = {"x-api-key": key} if key else {}
                return (await client.get("/v1/models", headers=headers)).status_code == 200

            assert await opens(None)
            made = (await client.post("/admin/keys", json={"name": "team"}, headers=root)).json()
            assert [await opens(key) for key in (None, made["key"])] == [False, True]
            path = f"/admin/keys/{made['id']}"
            rotated = (await client.post(f"{path}/rotate", headers=root)).json()
            assert [await opens(key) for key in (made["key"], rotated["key"])] == [False, True]
            await client.patch(path, json={"expires_in_s": 0}, headers=root)
            assert not await opens(rotated["key"])
            await client.patch(path, json={"expires_in_s": 60}, headers=root)
            assert await opens(rotated["key"])
            await client.delete(path, headers=root)
            assert not await opens(rotated["key"])


async def test_blas_uses_one_thread_while_the_app_serves(tmp_path: Path, embedder_cache: Path) -> None:
    def threads() -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    with threadpool_limits(2, user_api="blas"):
        async with app_state(settings(tmp_path, embedder_cache), {}):
            assert threads() == {1}
        assert threads() == {2}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"host": "0.0.0.0"}, "open to others"),
        ({"map": "/nowhere"}, "map"),
    ],
)
async def test_settings_that_cannot_work_are_refused_at_start(
    tmp_path: Path, embedder_cache: Path, more: dict[str, object], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        async with app_state(settings(tmp_path, embedder_cache, **more), {}):
            pass
