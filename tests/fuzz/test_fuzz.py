from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.program import ROOT

SECONDS = 60
SEEDS = {
    "parser": [
        b'\x00{"model": "auto", "messages": [{"role": "user", "content": "hi"}], "stream": true}',
        b'\x030.5{"model": "auto", "messages": [{}], "uniroute": {"lambda": 0, "models": ["a"]}, "n": 1e3}',
        b'\x00\xef\xbb\xbf{"model": "a", "messages": [{"content": [{"type": "text", "text": "\\u5b57"}]}]}',
    ],
    "events": [
        b'\x01\x02data: {"choices":[{"index":0,"delta":{"content":"hi"},"finish_reason":null}]}\n\ndata: [DONE]\n\n',
        b'\x01\x07\xef\xbb\xbf: ping\r\n\r\ndata:{"choices":[],\r\ndata: "usage":{}}\r\n\r\n',
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("target", SEEDS)
def test_a_minute_of_fuzzing_finds_nothing(tmp_path: Path, target: str) -> None:
    pytest.importorskip("atheris", reason="atheris has no wheel for this interpreter; `make test-all` installs it")
    (tmp_path / "corpus").mkdir()
    for number, seed in enumerate(SEEDS[target]):
        (tmp_path / "corpus" / str(number)).write_bytes(seed)
    command = [sys.executable, "-m", f"tests.fuzz.{target}", str(tmp_path / "corpus"), f"-max_total_time={SECONDS}"]
    command += [f"-artifact_prefix={tmp_path}/", "-max_len=512", "-seed=1", "-timeout=60", "-print_final_stats=1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS + 110, check=False)

    assert ended.returncode == 0, ended.stderr[-4000:]
    runs = re.search(r"stat::number_of_executed_units: (\d+)", ended.stderr)
    assert runs, ended.stderr[-4000:]
    assert int(runs[1]) > 10_000
    assert len(list((tmp_path / "corpus").iterdir())) > len(SEEDS[target])
