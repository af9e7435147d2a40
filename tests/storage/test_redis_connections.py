from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.profiling.broker import GROUP, STREAM, JobBroker
from proxy.settings.model_config import SettingsError
from proxy.settings.redis_address import RedisAddress
from proxy.settings.schema import Settings
from proxy.storage.client_keys import AuthRequiredLatch
from proxy.storage.redis import Store, StoreUnavailable, encode_command
from proxy.storage.redis_connections import PipelinedConnection
from proxy.storage.registry import Registry, RegistryError
from tests.support.ports import free_port
from tests.support.sentinels import Sentinels, TlsProxy, sentinels
from tests.support.tls import a_certificate, served_by
from tests.support.valkey import ValkeyServer, frozen


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    with ValkeyServer(tmp_path_factory.mktemp("plain")) as server:
        yield server


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write folders of the server's certificate, for 127.0.0.1, and of a client's; each is its own authority."""
    folders = tmp_path_factory.mktemp("server"), tmp_path_factory.mktemp("client")
    for folder in folders:
        a_certificate(folder)
    return folders


@pytest.fixture(scope="module")
def tls(valkey: ValkeyServer, certificates: tuple[Path, Path]) -> Iterator[TlsProxy]:
    with TlsProxy(valkey.port, served_by(certificates[0] / "both.pem")) as front:
        yield front


def settings(folder: Path, url: str, **more: object) -> Settings:
    return Settings.model_validate({"data_dir": folder, "redis_url": url, **more})


async def why_not(folder: Path, url: str, **more: object) -> str:
    """Return the store's message if it cannot be reached, else nothing."""
    store = await Store.open(settings(folder, url, **more))
    try:
        async with store.operation("look") as client:
            await client.set("uniroute:word", "kept")
    except StoreUnavailable as error:
        return str(error)
    finally:
        await store.close()
    return ""


async def test_a_certificate_is_checked_against_the_configured_authority(
    tmp_path: Path, tls: TlsProxy, certificates: tuple[Path, Path]
) -> None:
    url, authority = f"rediss://127.0.0.1:{tls.port}", certificates[0] / "cert.pem"
    assert await why_not(tmp_path, url, redis_ca_file=authority) == ""
    assert await why_not(tmp_path, f"{url}?ssl_ca_certs={authority}") == ""
    assert "certificate verify failed" in await why_not(tmp_path, url)
    assert "certificate verify failed" in await why_not(tmp_path, url, redis_ca_file=certificates[1] / "cert.pem")


async def test_a_pipelined_connection_is_encrypted_too(tls: TlsProxy, certificates: tuple[Path, Path]) -> None:
    store = Store(f"rediss://127.0.0.1:{tls.port}?ssl_ca_certs={certificates[0] / 'cert.pem'}")
    connection = await PipelinedConnection.open(store.client)
    echoed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    connection.send(encode_command(("ECHO", "x" * 100_000)), 1, echoed.set_result)
    async with asyncio.timeout(10):
        assert await echoed == ["x" * 100_000]
    await connection.dispose()
    await store.close()


async def test_a_certificate_must_name_the_requested_host(
    tmp_path: Path, tls: TlsProxy, certificates: tuple[Path, Path]
) -> None:
    url, authority = f"rediss://127.1:{tls.port}", certificates[0] / "cert.pem"
    assert "Hostname mismatch" in await why_not(tmp_path, url, redis_ca_file=authority)
    assert await why_not(tmp_path, f"{url}?ssl_check_hostname=false", redis_ca_file=authority) == ""


async def test_certificate_checks_can_be_turned_off_with_a_warning(
    tmp_path: Path, tls: TlsProxy, caplog: pytest.LogCaptureFixture
) -> None:
    assert await why_not(tmp_path, f"rediss://127.0.0.1:{tls.port}?ssl_cert_reqs=none") == ""
    assert "ssl_cert_reqs=none" in caplog.text


async def test_a_server_that_wants_a_client_certificate_gets_the_configured_one(
    tmp_path: Path, valkey: ValkeyServer, certificates: tuple[Path, Path]
) -> None:
    server, client = certificates
    context = served_by(server / "both.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(client / "cert.pem")
    with TlsProxy(valkey.port, context) as front:
        url, trusted = f"rediss://127.0.0.1:{front.port}", {"redis_ca_file": server / "cert.pem"}
        pair = {"redis_cert_file": client / "cert.pem", "redis_key_file": client / "key.pem"}
        assert await why_not(tmp_path, url, **trusted, **pair) == ""
        assert await why_not(tmp_path, url, **trusted, redis_cert_file=client / "both.pem") == ""
        assert await why_not(tmp_path, url, **trusted) != ""


async def test_an_unreadable_certificate_file_is_named_at_startup(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("")
    for name in ("redis_ca_file", "redis_cert_file"):
        with pytest.raises(SettingsError, match=rf"{name}.*empty\.pem"):
            await Store.open(settings(tmp_path, "rediss://127.0.0.1:1", **{name: tmp_path / "empty.pem"}))


async def test_a_user_can_be_given_in_the_url_or_by_a_setting(tmp_path: Path, valkey: ValkeyServer) -> None:
    with valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "app", "on", ">p/w", "~uniroute:*", "+@all")
    place = f"127.0.0.1:{valkey.port}"
    assert await why_not(tmp_path, f"redis://app:p%2Fw@{place}") == ""
    assert await why_not(tmp_path, f"redis://{place}", redis_username="app", redis_password="p/w") == ""
    assert "invalid username-password" in await why_not(tmp_path, f"redis://app:wrong@{place}")
    with pytest.raises(ValueError, match="redis_password") as refused:
        settings(tmp_path, f"redis://app:canary@{place}", redis_password="canary-too")
    assert "canary" not in str(refused.value.__cause__ or "")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://host", "must start with"),
        ("redis://:canary/canary@host:6379", "written %2F"),
        ("redis://u:12/canary@host:6379", "written %2F"),
        ("redis://:canary?canary@host", "unknown option"),
        ("redis://:canary#canary@host", "written %23"),
        ("redis://host:66000", "host:port"),
        ("redis://host/canary", "number of a database"),
        ("redis://host?socket_timeout=9", "unknown option"),
        ("rediss://host?ssl_cert_reqs=maybe", "ssl_cert_reqs"),
        ("redis://host?ssl_ca_certs=/ca.pem", "rediss://"),
        ("redis://canary@host", "redis://:password@host"),
        ("redis+sentinel://host:26379", "name the service"),
        ("redis://host?sentinel_password=canary", r"redis\+sentinel://"),
    ],
)
def test_an_invalid_address_is_refused_without_its_password(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        RedisAddress.parse(url)
    assert "canary" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("redis://:pw@[::1]/3", "redis://[::1]:6379/3"),
        ("unix:///a%20b/valkey.sock?db=2&password=pw", "unix:///a b/valkey.sock"),
        ("rediss+sentinel://u:p%2Cw@a,b:1,[::1]:2/main/4", "rediss+sentinel://a:26379,b:1,[::1]:2/main/4"),
    ],
)
def test_an_address_is_shown_without_its_password(url: str, name: str) -> None:
    assert RedisAddress.parse(url).name == name
    assert "pw" not in repr(RedisAddress.parse(url))


async def test_a_cluster_is_refused_at_startup_and_later(tmp_path: Path) -> None:
    with ValkeyServer(tmp_path / "node", cluster_enabled="yes", cluster_port=str(free_port())) as node:
        with pytest.raises(SettingsError, match=r"redis_url: Redis at .* is a node of a Redis Cluster, which is not"):
            await Store.open(settings(tmp_path, node.url))
        store = Store(node.url)
        with pytest.raises(StoreUnavailable, match="is a node of a Redis Cluster"):
            await Registry(store, (), AuthRequiredLatch(tmp_path)).keys.listed()
        await store.close()


async def test_a_replica_can_be_read_and_its_error_names_what_to_configure_instead(
    tmp_path: Path, valkey: ValkeyServer, caplog: pytest.LogCaptureFixture
) -> None:
    with ValkeyServer(tmp_path / "replica", replicaof=f"127.0.0.1 {valkey.port}") as replica:
        store = await Store.open(settings(tmp_path, replica.url))
        assert await store.available()
        with pytest.raises(StoreUnavailable, match=r"read only replica.*give its primary in redis_url"):
            await Registry(store, (), AuthRequiredLatch(tmp_path)).keys.create("a client")
        await store.close()
    assert [record.levelno for record in caplog.records if "is a replica" in record.message] == [logging.WARNING]


async def test_sentinels_lead_to_the_primary_over_tls_with_both_passwords(
    tmp_path: Path, certificates: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    context = served_by(certificates[0] / "both.pem")
    with sentinels(tmp_path, tls=context, password="pw", sentinel_password="spw") as group:
        trusted = {"redis_ca_file": certificates[0] / "cert.pem"}
        assert await why_not(tmp_path, group.url("rediss+sentinel"), **trusted) == ""
        apart = group.url("rediss+sentinel").partition("?")[0].replace(":pw@", "")
        passwords = {"redis_password": "pw", "redis_sentinel_password": "spw"}
        assert await why_not(tmp_path, apart, **trusted, **passwords) == ""
        unknown = await why_not(tmp_path, apart, **trusted, redis_password="pw", redis_sentinel_password="x")
        assert "no sentinel knows a primary of 'uniroute'" in unknown
        await a_change_is_with_the_replica_once_it_is_acknowledged(tmp_path, group, trusted, caplog)
        await a_sentinel_is_no_server(tmp_path, group)


async def a_change_is_with_the_replica_once_it_is_acknowledged(
    folder: Path, group: Sentinels, trusted: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    store = await Store.open(settings(folder, group.url("rediss+sentinel"), **trusted))
    registry = Registry(store, (), AuthRequiredLatch(folder))
    replica = next(server for server in group.servers if server is not group.primary())
    with group.client(replica) as client:
        key, _ = await registry.keys.create("a client")
        assert client.hexists("uniroute:keys", key.id)
        with frozen(replica.pid):
            await registry.keys.revoke(key.id)
        assert "no replica has what was done to change a key" in caplog.text
        with pytest.raises(RegistryError):
            await registry.remove_model("nobody")
    broker = JobBroker(store.server, no_work)
    await broker.declare_group()
    with group.client(replica) as client:
        assert [entry["name"] for entry in client.xinfo_groups(STREAM)] == [GROUP]
    await broker.shutdown()
    await store.close()


async def no_work(_job_id: str) -> None: ...


async def a_sentinel_is_no_server(folder: Path, group: Sentinels) -> None:
    port = group.ports[0]
    with pytest.raises(SettingsError, match=r"is a Sentinel, not a server: write redis\+sentinel://"):
        await Store.open(settings(folder, f"redis://:spw@127.0.0.1:{port}"))
