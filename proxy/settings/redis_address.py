"""Parse `redis_url` in all its forms.

redis://[user:password@]host[:port][/db]              rediss://… with TLS
unix:///path/of.sock[?db=0&password=…]
redis+sentinel://[user:password@]host[:port],host[:port]…/service[/db]      rediss+sentinel://… with TLS
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from router_core.text import closest_name

SCHEMES: Final = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")

DEFAULT_PORT = 6379

DEFAULT_SENTINEL_PORT = 26379

MAX_DB = 2**31 - 1

_HOST = re.compile(r"(?:\[(?P<ip6>[0-9A-Fa-f:.%]+)\]|(?P<host>[^:\[\]@/\s]+))(?::(?P<port>\d{1,5}))?")

_VERIFY = {"required": True, "cert_required": True, "none": False, "cert_none": False}

_SWITCH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

# Options behind the `?`, by redis-py's names, and the fields of RedisAddress that they set.
_QUERY: Final = {
    "db": "db",
    "username": "username",
    "password": "password",
    "sentinel_username": "sentinel_username",
    "sentinel_password": "sentinel_password",
    "ssl_ca_certs": "ca_file",
    "ssl_certfile": "cert_file",
    "ssl_keyfile": "key_file",
    "ssl_cert_reqs": "verify",
    "ssl_check_hostname": "check_hostname",
}

_TLS = ("ca_file", "cert_file", "key_file")

_SENTINEL = ("sentinel_username", "sentinel_password")


@dataclass(frozen=True)
class RedisAddress:
    """Where Redis is, the credentials for it, and the certificates that identify it."""

    hosts: tuple[tuple[str, int], ...] = ()
    """Host and port of the server, or of the sentinels."""
    path: str | None = None
    """Path of a unix socket, in place of hosts."""
    service: str | None = None
    """What the sentinels call the server; None without sentinels."""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_file: str | None = None
    """File of trusted certificates; None: the system's."""
    cert_file: str | None = None
    key_file: str | None = None
    verify: bool = True
    check_hostname: bool = True

    def __post_init__(self) -> None:
        for name in _TLS:
            if getattr(self, name) and not self.tls:
                raise ValueError(f"redis_{name} is for TLS, and redis_url is without: write rediss://")
        if self.key_file and not self.cert_file:
            raise ValueError("redis_key_file is of no use without redis_cert_file")
        for name in _SENTINEL:
            if getattr(self, name) and self.service is None:
                raise ValueError(f"redis_{name} is for sentinels, and redis_url names none: write redis+sentinel://")
        if self.username and not self.password:
            raise ValueError(
                "redis_username is of no use without redis_password; a password alone is written redis://:password@host"
            )

    @property
    def name(self) -> str:
        """Return the address without user names, passwords and files, for log lines and errors."""
        if self.path is not None:
            return f"unix://{self.path}"
        scheme = ("rediss" if self.tls else "redis") + ("" if self.service is None else "+sentinel")
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return f"{scheme}://{hosts}{'' if self.service is None else f'/{self.service}'}/{self.db}"

    @classmethod
    def parse(cls, url: str, stated: Mapping[str, str | None] | None = None) -> RedisAddress:
        """Parse a URL.

        Args:
            stated: fields of this class that settings state apart from the URL.

        Raises:
            ValueError: says what is wrong, without any part that may be a secret.
        """
        scheme, separator, _ = url.partition("://")
        if not separator or scheme not in SCHEMES:
            raise ValueError(f"must start with {', '.join(f'{each}://' for each in SCHEMES[:-1])} or {SCHEMES[-1]}://")
        parts = urlsplit(url)
        if parts.fragment:
            raise ValueError("holds a #: in a password it is written %23")
        values = _query(parts.query)
        userinfo, _, hosts = parts.netloc.rpartition("@")
        user, _, password = userinfo.partition(":")
        values |= {"username": unquote(user) or values.get("username")}
        values |= {"password": unquote(password) or values.get("password")}
        for name, value in (stated or {}).items():
            if value is not None and values.get(name) is not None:
                raise ValueError(f"states what redis_{name} states too; leave one of them out")
            values[name] = value if value is not None else values.get(name)
        checked = _checked(values)
        if scheme == "unix":
            return cls(path=unquote(parts.path), **checked)
        tls = scheme.startswith("rediss")
        if scheme.endswith("+sentinel"):
            service, db = _service(parts.path)
            found = tuple(_host(each, DEFAULT_SENTINEL_PORT) for each in hosts.split(","))
            return cls(hosts=found, service=service, tls=tls, **{"db": db, **checked})
        return cls(hosts=(_host(hosts, DEFAULT_PORT),), tls=tls, **{"db": _db(parts.path.strip("/") or "0"), **checked})


def _query(query: str) -> dict[str, str | None]:
    values: dict[str, str | None] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _QUERY:
            closest = closest_name(name, _QUERY)
            hint = f"did you mean {closest!r}?" if closest else f"known are {', '.join(_QUERY)}"
            # The name is not repeated: it is the rest of a password that holds a ?.
            raise ValueError(f"has an unknown option after its ?; {hint}")
        values[_QUERY[name]] = value
    return values


def _checked(values: Mapping[str, str | None]) -> dict[str, Any]:
    """Drop what is not stated, and convert the rest to the types of the fields."""
    known = {column.name for column in fields(RedisAddress)}
    checked: dict[str, Any] = {name: value for name, value in values.items() if value and name in known}
    if "db" in checked:
        checked["db"] = _db(str(checked["db"]))
    for name, words in (("verify", _VERIFY), ("check_hostname", _SWITCH)):
        if name in checked:
            word = str(checked[name]).lower()
            if word not in words:
                option = next(each for each, what in _QUERY.items() if what == name)
                raise ValueError(f"has an unknown {option}; it is one of {', '.join(words)}")
            checked[name] = words[word]
    return checked


def _host(text: str, default_port: int) -> tuple[str, int]:
    found = _HOST.fullmatch(text or "localhost")
    port = int((found and found["port"]) or default_port)
    if found is None or not 0 < port < 2**16:
        raise ValueError(
            "must name each server as host or host:port; in a user name or a password / ? # @ : , and % are written"
            " %2F %3F %23 %40 %3A %2C and %25, or the password is put into redis_password"
        )
    return unquote(found["ip6"] or found["host"]), port


def _service(path: str) -> tuple[str, int]:
    service, _, db = path.strip("/").partition("/")
    if not service:
        raise ValueError("must name the service that the sentinels watch: redis+sentinel://host:26379/mymaster")
    return unquote(service), _db(db or "0")


def _db(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 10 or int(text) > MAX_DB:
        raise ValueError("must end with the number of a database, as /0; a / in a password is written %2F")
    return int(text)
