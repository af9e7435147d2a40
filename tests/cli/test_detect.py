from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from proxy.server.startup import PROVIDERS, detect_models, with_detected
from proxy.settings.models import ModelConfig
from proxy.settings.schema import Settings
from proxy.storage.price_map import bundled_catalog, parse_price_map

NOBODY = "http://127.0.0.1:9"


@contextmanager
def an_ollama(reply: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/tags" else 404)
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_no_key_and_no_ollama_offers_nothing() -> None:
    assert detect_models({}, bundled_catalog(), ollama_url=NOBODY) == ()


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.key)
def test_each_provider_offers_two_or_three_models_with_a_known_price(provider: object) -> None:
    key = provider.key  # type: ignore[attr-defined]
    found = detect_models({key: "secret"}, bundled_catalog(), ollama_url=NOBODY)
    assert len(found) in (2, 3)
    assert {entry.litellm_params["api_key"] for entry in found} == {f"os.environ/{key}"}
    assert "secret" not in repr([entry.model_dump() for entry in found])


def test_a_model_that_the_price_map_does_not_know_is_not_offered() -> None:
    entry = {"litellm_provider": "openai", "mode": "chat", "input_cost_per_token": 1e-6, "output_cost_per_token": 1e-6}
    catalog = parse_price_map({"gpt-6-luna": entry})
    found = detect_models({"OPENAI_API_KEY": "secret"}, catalog, ollama_url=NOBODY)
    assert [entry.model_name for entry in found] == ["openai/gpt-6-luna"]


def test_the_chat_models_of_an_ollama_are_offered_for_free() -> None:
    names = ["llama3.2:3b", "nomic-embed-text:latest", "bad name"]
    with an_ollama(json.dumps({"models": [{"name": name} for name in names]}).encode()) as url:
        (found,) = detect_models({}, bundled_catalog(), ollama_url=url)
    assert found.model_name == "ollama/llama3.2:3b"
    assert found.litellm_params == {"model": "ollama_chat/llama3.2:3b", "api_base": url}
    assert found.model_info.free


def test_another_program_on_the_port_of_ollama_is_reported_not_trusted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), an_ollama(b"<html>") as url:
        assert detect_models({}, bundled_catalog(), ollama_url=url) == ()
    assert "not as Ollama does" in caplog.text


def test_a_configured_model_is_kept_as_it_is() -> None:
    configured = ModelConfig(model_name="cheap", litellm_params={"model": "openai/gpt-6-luna", "temperature": 0})
    found = detect_models({"OPENAI_API_KEY": "secret"}, bundled_catalog(), ollama_url=NOBODY)
    settings = with_detected(Settings(model_list=(configured,)), found)
    assert [entry.model_name for entry in settings.model_list] == ["cheap", "openai/gpt-6.1-sol"]
