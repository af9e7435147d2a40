from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

_TASKS = re.compile(r"^uniroute_tasks (\S+)$", re.MULTILINE)
_KIB = 1024


@dataclass(frozen=True)
class Facts:
    requests: int
    resident: int
    """Bytes, as are the next two."""
    proportional: int
    anonymous: int
    """Of the resident: what is no file's."""
    descriptors: int
    sockets: int
    tasks: int


def facts_of(pid: int, url: str, key: str, requests: int) -> Facts:
    """Read the facts of a process. `url` and `key`: where the server exposes its metrics."""
    memory = _rollup(pid)
    targets = _descriptors(pid)
    return Facts(
        requests,
        memory["Rss"],
        memory["Pss"],
        memory["Anonymous"],
        len(targets),
        sum(target.startswith("socket:") for target in targets),
        _tasks(url, key),
    )


def _rollup(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(rest.split()[0]) * _KIB for name, _, rest in (line.partition(":") for line in lines)}


def _descriptors(pid: int) -> list[str]:
    targets = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            targets.append(str(link.readlink()))
    return targets


def _tasks(url: str, key: str) -> int:
    reply = httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {key}"}, timeout=30, trust_env=False)
    found = _TASKS.search(reply.text)
    assert found, reply.text[:200]
    return int(float(found[1]))
