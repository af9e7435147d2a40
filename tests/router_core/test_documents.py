from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxy.cli.console import BadArgument, read_prompts
from proxy.cli.models import litellm_params_from, profile_from
from proxy.settings.model_config import SettingsError
from proxy.settings.schema import load_settings
from router_core.artifact import ARRAYS, BUILTIN_MAP, MANIFEST, load_map
from router_core.documents import MAX_CONFIG_BYTES, MAX_LINE_BYTES, MAX_MANIFEST_BYTES, MAX_PROFILE_BYTES
from router_core.errors import InvalidArtifact, InvalidOutcomes, InvalidValidationSet
from router_core.evaluation.outcomes import read_prices, read_rows
from router_core.validation.loading import load_validation_set

LAUGHS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))
MERGES = "\n".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, 12))
CHAIN = "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 500))
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"a0: &a0 [1]\n{LAUGHS}", "more than 100,000 values"),
        (f"m0: &m0 {{x: 1}}\n{MERGES}", "more than 100,000 values"),
        (f"a0: &a0 [1]\n{CHAIN}", "nested deeper than 64"),
        ("uniroute: &a {x: *a}", "line 1: an anchor holds an alias of itself"),
        ("&a [*a]", "an alias of itself"),
        (f"x: {DEEP}", "nested deeper than 64"),
        ("x: " + "{a: " * 1000, "nested deeper than 64"),
        ("- " * 1000, "nested deeper than 64"),
        ("#" * (MAX_CONFIG_BYTES + 1), "larger than 1,000,000 bytes"),
        ("x: " + "9" * 5000, "a value cannot be read"),
        ("x: 2024-99-99", "a value cannot be read"),
        ("x: !!bool maybe", "a value cannot be read"),
        ("x: !!timestamp maybe", "a value cannot be read"),
        ("x: !!map [1]", "not valid YAML"),
        ("x: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("x: \x00", "not valid YAML"),
    ],
    ids=range(16),
)
def test_a_configuration_that_explodes_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SettingsError) as refused:
        load_settings(tmp_path / "c.yaml", {})
    assert (words in str(refused.value), "\n" in str(refused.value), len(str(refused.value)) < 600) == (
        True,
        False,
        True,
    )


def test_ordinary_anchors_and_merges_work(tmp_path: Path) -> None:
    near, free = "&near {model: openai/a, api_base: 'http://h/v1'}", "&free {free: true}"
    first = f"  - {{model_name: a, litellm_params: {near}, model_info: {free}}}\n"
    params = [f"{{<<: *near, model: openai/x{n}}}, model_info: *free" for n in range(300)]
    more = "".join(f"  - {{model_name: m{n}, litellm_params: {each}}}\n" for n, each in enumerate(params))
    (tmp_path / "c.yaml").write_text(f"model_list:\n{first}{more}")
    read = load_settings(tmp_path / "c.yaml", {}).model_list
    assert (len(read), read[300].litellm_params) == (301, {"model": "openai/x299", "api_base": "http://h/v1"})
    assert read[300].model_info.free


def test_an_endless_configuration_is_refused() -> None:
    with pytest.raises(SettingsError, match="larger than"):
        load_settings(Path("/dev/zero"), {})


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (DEEP, "nested deeper than 64"),
        ("[" * 70 + "]" * 70, "nested deeper than 64"),
        (" " * (MAX_MANIFEST_BYTES + 1), "larger than 4,000,000 bytes"),
        (f"[{'0,' * 1_200_000}0]", "more than 1,000,000 values"),
        ("9" * 5000, "is not JSON"),
    ],
    ids=range(5),
)
def test_a_manifest_that_explodes_is_refused(tmp_path: Path, manifest: str, words: str) -> None:
    (tmp_path / MANIFEST).write_text(manifest)
    with pytest.raises(InvalidArtifact, match=words):
        load_map(tmp_path)


def map_with(folder: Path, member: bytes) -> Path:
    """Write a map with a correct digest whose centroids are these bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("centroids.npy", member)
    manifest = json.loads((BUILTIN_MAP / MANIFEST).read_text())
    manifest["sha256"] = hashlib.sha256(packed.getvalue()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / ARRAYS).write_bytes(packed.getvalue())
    return folder


def test_arrays_that_unpack_to_more_than_is_there_are_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    shape: Any = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
    np.lib.format.write_array_header_1_0(header, shape)
    with pytest.raises(InvalidArtifact, match="says that it is larger than it is"):
        load_map(map_with(tmp_path, header.getvalue()))
    with pytest.raises(InvalidArtifact, match="not a complete cluster map"):
        load_map(map_with(tmp_path, b"no array"))


def test_a_profile_that_explodes_is_refused(tmp_path: Path) -> None:
    for text, words in ((DEEP, "nested deeper"), (" " * (MAX_PROFILE_BYTES + 1), "larger than")):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(BadArgument, match=words):
            profile_from("m", None, None, tmp_path / "p.json", None)


def test_exploding_lines_are_refused_with_their_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for text in (f'{{"a": {DEEP}', f'{{"a": {"[" * 70}{"]" * 70}}}'):
        path.write_text(text)
        with pytest.raises(InvalidOutcomes, match=r"line 1: is not usable JSON .*nested deeper"):
            list(read_rows(path))
        with pytest.raises(InvalidValidationSet, match=r"line 1: not usable JSON: .*nested deeper"):
            load_validation_set(path)
        with pytest.raises(BadArgument, match=r"line 1: is nested deeper"):
            list(read_prompts([path]))
        with pytest.raises(InvalidOutcomes, match="nested deeper"):
            read_prices(path)
    path.write_text("x" * (MAX_LINE_BYTES + 1))
    with pytest.raises(BadArgument, match="line 1: is longer"):
        list(read_prompts([path]))


def test_a_repeated_name_among_many_is_found_quickly(tmp_path: Path) -> None:
    names = ",".join(f'"m{n}":1' for n in range(200_000))
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "p", "scores": {{{names},"m199999":1}}}}')
    with pytest.raises(InvalidOutcomes, match="'m199999' is stated twice"):
        list(read_rows(tmp_path / "a.jsonl"))


def test_a_parameter_of_many_brackets_is_a_text() -> None:
    assert litellm_params_from("openai/x", None, None, [f"user={DEEP}"])["user"] == DEEP
