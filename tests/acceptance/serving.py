from __future__ import annotations

import time
from typing import Any, Self

import openai

from router_core.validation.validation_set import ValidationPrompt
from tests.support.ports import free_port
from tests.support.program import start_program
from tests.support.proxy_process import ProxyProcess

# USD per input token of a cheap model; the expensive one costs a hundred times as much.
PRICE = 1e-7
READY_S = 180.0


class ServedProxy(ProxyProcess):
    workers = 2

    def start(self) -> Self:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        arguments = ("serve", "--port", str(port), "--workers", str(self.workers))
        self._process = start_program(
            "proxy.cli", *arguments, environ=self._environ, stdout=self._log, stderr=self._log
        )
        self._wait_until_ready()
        return self

    def add(self, name: str, api_base: str, price: float, prompts: int) -> str:
        """Add a model and return its job's id."""
        body = {
            "model_name": name,
            "litellm_params": {"model": f"openai/{name}", "api_base": api_base, "api_key": "os.environ/MODEL_API_KEY"},
            "model_info": {"input_cost_per_token": price, "output_cost_per_token": 4 * price},
            "profile": {"prompts": prompts, "max_usd": 10.0},
        }
        reply = self.admin("POST", "/admin/models", body)
        assert reply.status_code == 202, reply.text
        return str(reply.json()["job"])

    def job(self, job_id: str) -> dict[str, Any]:
        document: dict[str, Any] = self.admin("GET", f"/admin/jobs/{job_id}").json()
        return document

    def wait_for(self, job_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + READY_S
        while (job := self.job(job_id))["state"] in ("queued", "running"):
            assert time.monotonic() < deadline, job
            time.sleep(0.05)
        return job


def ask(base_url: str, prompt: ValidationPrompt, **extra: Any) -> tuple[str, str]:
    """Send one routed request over a connection of its own; return (model, answer)."""
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        answer = client.chat.completions.create(model="auto", messages=[dict(m) for m in prompt.messages], **extra)  # type: ignore[misc]
    return answer.model, answer.choices[0].message.content or ""
