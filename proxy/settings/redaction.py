"""Find and hide the secrets in a model's parameters: by the name of the field, by their look, and in addresses.

What may not be stored, what is hidden in responses and logs, and what is cut out of a provider's errors, all follow it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

REFERENCE = "os.environ/"

HIDDEN = "***"

_HEADERS = ("extra_headers", "headers")

# A name that ends in one of these words, or holds one of `_SECRET_WORDS`, is that of a secret.
_SECRET_ENDINGS = frozenset(
    """
    secret secrets password passwd passwords pwd passphrase credential credentials auth authorization cookie apikey
    apikeys accesskey secretkey privatekey bearer jwt signature sig key keys
    """.split()
)

_SECRET_WORDS = frozenset(
    """
    secret secrets password passwd credential credentials authorization apikey
    """.split()
)

_SECRET_PAIRS = ("api_key", "access_key", "private_key", "subscription_key")

_NOT_SECRET = frozenset(
    """
    prompt_cache_key cache_key preset_cache_key bos_token eos_token pad_token unk_token sep_token cls_token
    mask_token stop_token start_token end_token max_token min_token special_token image_token
    """.split()
)

_SECRET_FORMATS = re.compile(
    r"(?:(?:sk|pk|rk)-[\w-]{6,}|(?:xai|gsk|hf|ghp|gho|ghs|github_pat|glpat|pplx|nvapi|xox[abprs])[-_][\w-]{16,}"
    r"|AIza[\w-]{30,}|A[KS]IA[A-Z0-9]{16}|ya29\.[\w-]{16,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
    r"|(?:bearer|basic)\s+\S{6,})",
    re.IGNORECASE,
)

_PEM = "-----BEGIN "

_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

_PUBLIC_QUERY = frozenset({"api-version", "api_version"})

# Values that people write where a key is required and none is needed.
_PLACEHOLDERS = frozenset({"-", "none", "empty", "dummy", "no-key", "not-needed", "unused"})

_MAX_DEPTH = 64


class FoundSecret(NamedTuple):
    """A secret that is written out in a parameter, not named by a reference."""

    path: str
    value: str


def is_reference(value: object) -> bool:
    return isinstance(value, str) and value.startswith(REFERENCE)


def is_secret_name(name: str) -> bool:
    plain = re.sub(r"[^a-z0-9]+", "_", _CAMEL_CASE.sub("_", name).lower()).strip("_")
    if plain in _NOT_SECRET:
        return False
    parts = plain.split("_")
    if parts[-1] in _SECRET_ENDINGS or parts[-1] == "token":
        return True
    return not _SECRET_WORDS.isdisjoint(parts) or any(f"_{pair}_" in f"_{plain}_" for pair in _SECRET_PAIRS)


def looks_secret(value: str) -> bool:
    text = value.strip()
    return _SECRET_FORMATS.fullmatch(text) is not None or text.startswith(_PEM)


def _is_secret(value: str, *, named: bool) -> bool:
    return bool(value) and ((named and value.lower() not in _PLACEHOLDERS) or looks_secret(value))


def find_secrets(name: str, value: Any, path: str = "") -> Iterator[FoundSecret]:
    """Yield the secrets that are written out in the value of this field, however deep, each with its path."""
    yield from _find_secrets(value, path or name, named=is_secret_name(name), depth=0)


def _find_secrets(value: Any, path: str, *, named: bool, depth: int) -> Iterator[FoundSecret]:
    if depth > _MAX_DEPTH:
        return
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _find_secrets(inner, f"{path}.{name}", named=named or is_secret_name(str(name)), depth=depth + 1)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _find_secrets(inner, f"{path}[{place}]", named=named, depth=depth + 1)
    elif isinstance(value, str) and not is_reference(value):
        if _is_secret(value, named=named):
            yield FoundSecret(path, value)
        else:
            yield from _secrets_in_url(value, path)


def _secrets_in_url(value: str, path: str) -> Iterator[FoundSecret]:
    parts = _split(value)
    if parts is None:
        return
    if parts.password or parts.username:
        for part in (parts.username, parts.password):
            if part:
                yield FoundSecret(f"{path} (user and password)", unquote(part))
    for name, text in _query(parts):
        if text and not is_reference(text) and (is_secret_name(name) or looks_secret(text)):
            yield FoundSecret(f"{path}?{name}", text)


def _split(value: str) -> SplitResult | None:
    if "://" not in value[:16]:
        return None
    try:
        parts = urlsplit(value)
        return parts if parts.netloc or parts.query else None
    except ValueError:
        return None


def _query(parts: SplitResult) -> list[tuple[str, str]]:
    pairs = (pair.partition("=") for pair in re.split("[&;]", parts.query) if pair)
    return [(unquote(name), unquote(text)) for name, _, text in pairs]


def holds_secret(name: str, value: Any) -> bool:
    """Return whether the field is a secret or holds one, written out or named by a reference."""
    if isinstance(value, Mapping):
        return any(holds_secret(str(inner), each) for inner, each in value.items()) or any(find_secrets(name, value))
    return is_reference(value) or any(True for _ in find_secrets(name, value))


def redact_value(name: str, value: Any) -> Any:
    """Redact a value for people to read: hide secrets and the values of headers, keep references."""
    if name in _HEADERS and isinstance(value, Mapping):
        return {field: each if is_reference(each) else HIDDEN for field, each in value.items()}
    return _redact(value, named=is_secret_name(name), depth=0)


def _redact(value: Any, *, named: bool, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        return HIDDEN
    if isinstance(value, Mapping):
        return {
            name: _redact(inner, named=named or is_secret_name(str(name)), depth=depth + 1)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(inner, named=named, depth=depth + 1) for inner in value]
    if isinstance(value, str) and not is_reference(value):
        return HIDDEN if _is_secret(value, named=named) else redact_url(value)
    return value


def strip_url(value: str) -> str:
    """Remove user, password and query from an address."""
    parts = _split(value)
    return value if parts is None else urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def redact_url(value: str) -> str:
    """Hide user, password and the values of the query of an address. Return any other text as it is."""
    parts = _split(value)
    if parts is None or not (parts.query or parts.username or parts.password):
        return value
    host = parts.netloc.rpartition("@")[2]
    netloc = f"{HIDDEN}@{host}" if "@" in parts.netloc else host
    query = "&".join(
        f"{name}={text}" if name.lower() in _PUBLIC_QUERY or is_reference(text) else f"{name}={HIDDEN}"
        for name, text in _query(parts)
    )
    return urlunsplit((parts.scheme, netloc, parts.path, query, ""))
