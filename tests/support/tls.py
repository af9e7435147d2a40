"""A self-signed certificate, and a server's side of TLS with it."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path


def a_certificate(folder: Path) -> Path:
    """For 127.0.0.1; with its key in one file."""
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
