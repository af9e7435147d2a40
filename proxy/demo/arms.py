"""The demo's three arms: real models on this machine, with the parameters and the notional prices they run under."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxy.demo.local_models import LlamaServer, gemma_base, smollm2, start_llama

CONTEXT_TOKENS = 2048
_SLOTS = 4


@dataclass(frozen=True)
class Arm:
    """A model with its parameters. Prices are USD per million tokens, and notional: these models cost nothing."""

    name: str
    about: str
    input_cost: float
    output_cost: float
    parameters: dict[str, Any] = field(default_factory=dict)

    def registration(self, api_base: str, prompts: int) -> dict[str, Any]:
        """The body of POST /admin/models."""
        return {
            "model_name": self.name,
            "litellm_params": {"model": f"openai/{self.name}", "api_base": api_base, **self.parameters},
            "model_info": {
                "input_cost_per_token": self.input_cost / 1e6,
                "output_cost_per_token": self.output_cost / 1e6,
                "max_input_tokens": CONTEXT_TOKENS,
            },
            "profile": {"prompts": prompts, "max_usd": 1.0},
        }


_BRIEFLY = {"system": "You are a helpful assistant. Answer briefly with the answer only."}
SMOLLM2 = Arm("smollm2", "SmolLM2-135M-Instruct at temperature 0", 2.50, 10.0, {**_BRIEFLY, "temperature": 0})
HOT = Arm("smollm2-hot", "the same weights at temperature 2.5", 0.50, 2.0, {**_BRIEFLY, "temperature": 2.5})
ECHO = Arm(
    "gemma3-base",
    "Gemma 3 270M before instruction tuning, which repeats the question",
    0.10,
    0.4,
    {"temperature": 0, "stop": ["<|im_end|>", "<|im_start|>"]},  # its template is not its own: it never ends a turn
)


def start_arms(stack: ExitStack, folder: Path, announce: Callable[[str], None]) -> list[tuple[Arm, str]]:
    """Each arm and the address it answers at. Two processes: the first two arms share their weights."""
    announce("starting SmolLM2-135M-Instruct and Gemma 3 270M under llama.cpp")
    smol = stack.enter_context(_start(smollm2(), folder / "smollm2.log"))
    gemma = stack.enter_context(_start(gemma_base(folder / "models"), folder / "gemma3.log"))
    return [(SMOLLM2, smol.api_base), (HOT, smol.api_base), (ECHO, gemma.api_base)]


def _start(model: Path, log: Path) -> LlamaServer:
    threads = max(1, (os.cpu_count() or 2) // 2)  # there are two servers
    return start_llama(model, log, threads=threads, slots=_SLOTS, context=CONTEXT_TOKENS * _SLOTS)
