from __future__ import annotations

import functools
import importlib
import ssl
import subprocess
from pathlib import Path
from typing import Any


def a_certificate(folder: Path) -> Path:
    """Write a certificate for 127.0.0.1, with its key in one file."""
    made = folder / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    out = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*command, *names, *out], check=True, capture_output=True)
    made.write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return made


def served_by(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def share_tls_contexts() -> None:
    """Read Mozilla's authorities once. Otherwise each client does, for 20 ms of processor time, TLS or not."""
    transports: Any = importlib.import_module("httpx._transports.default")
    transports.create_ssl_context = functools.cache(transports.create_ssl_context)
