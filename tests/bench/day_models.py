"""Serve the models of a simulated day: `python -m tests.bench.day_models --port 9001 --worse FILE --seed 0`.

Three models over kept connections, in OpenAI's chat completions. Each knows the answer to every validation prompt, and
gives it or a useless one by chance: harder families are missed more often, and by the cheaper models more often. While
the file exists, the model `small` misses more of everything. GET /ledger says what all answers together cost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any

from tests.acceptance.kinds import IGNORANCE, Library
from tests.support.scripted_answers import newest_user_text

# Name → picodollars a token of the prompt and of the answer, and the share of answers that is wrong.
MODELS = {
    "small": (100_000, 400_000, 0.20),
    "medium": (400_000, 1_600_000, 0.14),
    "large": (3_000_000, 12_000_000, 0.08),
}

WORSE = "small"

# By how much more the families are missed from the easiest to the hardest.
SPREAD = 0.2


class Models:
    def __init__(self, worse: Path, drop: float, seed: int) -> None:
        self._library = Library.open()
        self._worse = worse
        self._drop = drop
        self._seed = seed
        self._asked: Counter[tuple[str, str]] = Counter()
        self.picousd: Counter[str] = Counter()

    def error(self, model: str, family: str) -> float:
        difficulty = int.from_bytes(blake2b(family.encode(), digest_size=2).digest()) / 65_535
        more = self._drop if model == WORSE and self._worse.exists() else 0.0
        return min(max(MODELS[model][2] + SPREAD * (difficulty - 0.5) + more, 0.01), 0.99)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        model, text = str(body["model"]).removesuffix("-upstream"), newest_user_text(body)
        self._asked[model, text] += 1
        rng = Random(f"{self._seed}/{model}/{text}/{self._asked[model, text]}")
        prompt = self._library.by_text.get(text)
        knows = prompt is not None and rng.random() >= self.error(model, prompt.family)
        words = (prompt.reference or IGNORANCE) if prompt is not None and knows else IGNORANCE
        read, written = 8 + len(text) // 4, 60 + rng.randrange(200)
        self.picousd[model] += read * MODELS[model][0] + written * MODELS[model][1]
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        message = {"role": "assistant", "content": words}
        return {
            "id": "c-1",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": usage,
        }

    async def serve(self, port: int) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", port, limit=2**20, backlog=256)
        async with server:
            await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                if head.startswith("get "):
                    reply: Any = dict(self.picousd)
                else:
                    lengths = [line for line in head.split("\r\n") if line.startswith("content-length:")]
                    reply = self.answer(json.loads(await reader.readexactly(int(lengths[0].partition(":")[2]))))
                raw = json.dumps(reply).encode()
                heading = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(raw)
                writer.write(heading + raw)
                await writer.drain()
        writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--worse", type=Path, required=True)
    parser.add_argument("--drop", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(Models(arguments.worse, arguments.drop, arguments.seed).serve(arguments.port))


if __name__ == "__main__":
    main()
