from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from docs.generate import GROUPS, named_fields, pages
from proxy.app import from_settings
from proxy.settings.schema import Settings, load_settings
from proxy.storage.redis import PRICING, price_key
from router_core.types import Price
from tests.deploy.monitoring import described

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
WRITTEN = sorted([*DOCS.glob("*.md"), *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY"))])
MAX_README_LINES = 200
MAX_COLUMNS = 120
METRICS = DOCS / "observability.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@cache
def text(path: Path) -> str:
    return path.read_text("utf-8")


def code(path: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text(path)) if kind == language]


def prose(path: Path) -> str:
    return FENCE.sub("", text(path))


def rows(path: Path, heading: str = "") -> list[str]:
    """Return the first cells of the tables of a page, or of what follows one of its headings."""
    return re.findall(r"^\| (`.*?) \|", text(path).partition(heading)[2] if heading else text(path), re.MULTILINE)


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


each_page = pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)


@pytest.mark.parametrize("name", pages())
def test_a_generated_page_is_what_the_code_says(name: str) -> None:
    assert text(DOCS / name) == pages()[name], "run `make docs`"


def test_every_setting_has_a_place_on_the_settings_page() -> None:
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(dict(named_fields(Settings)))


def test_the_settings_page_shows_the_defaults_that_are_in_force() -> None:
    documented = dict(re.findall(r"^\| `([^`]+)` \| ([^|]*) \|", text(DOCS / "settings.md"), re.MULTILINE))
    settings = load_settings(None, {})
    assert float(documented["lambda"]) == settings.lambda_
    assert int(documented["breaker.failures"]) == settings.breaker.failures
    assert documented["route_names"] == f"`{settings.route_names[0]}`"
    input_price, output_price = map(float, documented["reference_price"].split(", "))
    assert settings.reference_price == Price(input_price, output_price)


def test_the_readme_is_read_in_one_sitting() -> None:
    lines = text(ROOT / "README.md").splitlines()
    first_request = next(number for number, line in enumerate(lines, 1) if line.startswith("curl "))
    assert len(lines) <= MAX_README_LINES
    assert first_request <= 60


@each_page
def test_no_line_of_text_is_too_long(path: Path) -> None:
    lines = prose(path).splitlines()
    assert [line for line in lines if len(line) > MAX_COLUMNS and not line.startswith("|") and " " in line] == []


@each_page
def test_every_internal_link_leads_somewhere(path: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)) if "://" not in link]
    for link in links:
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_every_file_that_is_named_exists(path: Path) -> None:
    named = re.findall(r"`((?:proxy|router_core|tests|docs|deploy)/[\w/.-]*)`", prose(path))
    assert [name for name in named if not (ROOT / name).exists()] == []


@each_page
def test_every_test_that_is_named_exists(path: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text(path))
    assert [name for file, name in named if f"def {name}(" not in text(ROOT / file)] == []


@each_page
def test_every_program_that_is_named_can_be_run(path: Path) -> None:
    named = re.findall(r"python -m ([\w.]+)", text(path))
    assert [name for name in named if find_spec(name) is None] == []


@pytest.mark.parametrize(
    "source", [yaml for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))) for yaml in code(path, "yaml")]
)
def test_a_configuration_that_is_shown_loads(source: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(source, "utf-8")
    assert load_settings(tmp_path / "config.yaml", {}).model_list


@each_page
def test_every_json_that_is_shown_is_json(path: Path) -> None:
    examples = code(path, "json")
    assert [type(json.loads(each)) for each in examples] == [dict] * len(examples)


def test_the_documented_price_hash_and_channel_are_the_ones_in_use() -> None:
    page = text(DOCS / "models.md")
    assert f"HSET {price_key('small')} " in page
    assert f"PUBLISH {PRICING} small" in page


@pytest.mark.parametrize("number", range(len(code(DOCS / "library.md", "python"))))
def test_an_example_of_the_library_prints_what_is_shown(number: int, embedder_cache: Path, tmp_path: Path) -> None:
    example, output = (code(DOCS / "library.md", kind)[number] for kind in ("python", "text"))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "uniroute").symlink_to(embedder_cache)
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=ROOT,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == output, done.stderr


def test_every_endpoint_is_listed_and_no_other() -> None:
    served = {
        f"{method.upper()} {path}"
        for path, methods in from_settings(Settings()).openapi()["paths"].items()
        for method in methods
    }
    assert {row.strip("`") for row in rows(DOCS / "http-api.md") if " /" in row and "`, `" not in row} == served


@cache
def source() -> str:
    paths = (path for package in ("proxy", "router_core") for path in (ROOT / package).rglob("*.py"))
    return "\n".join(path.read_text("utf-8") for path in paths)


def test_every_error_code_that_is_listed_is_in_use() -> None:
    codes = re.findall(r"^\| \d{3} \| `(\w+)` \|", text(DOCS / "http-api.md"), re.MULTILINE)
    assert len(codes) > 20
    assert [code for code in codes if f'"{code}"' not in source()] == []


def test_every_key_of_redis_is_listed() -> None:
    listed = text(DOCS / "design.md")
    used = set(re.findall(r'f?"(uniroute:[a-z:-]*[a-z])', source()))
    assert len(used) > 10
    assert [key for key in used if f"`{key}" not in listed] == []


def test_every_metric_is_listed_with_its_labels_and_what_it_means() -> None:
    listed = re.findall(r"^\| `((?:uniroute|process)_\w+)` \| (\w+) \| (.*?) \| (.*) \|$", text(METRICS), re.MULTILINE)
    expected = [
        (
            each.name + ("_total" if each.kind == "counter" else ""),
            each.kind,
            ", ".join(f"`{label}`" for label in each.labels) or "–",
            each.text,
        )
        for each in described()
    ]
    assert listed == expected


def test_every_name_of_the_glossary_is_in_the_code() -> None:
    named = [name for row in rows(DOCS / "glossary.md", "## Names in the code") for name in re.findall(r"`(\w+)`", row)]
    defined = set(re.findall(r"^ *(?:class|def|async def) (\w+)", source(), re.MULTILINE))
    defined |= set(re.findall(r"^(\w+) = ", source(), re.MULTILINE))
    assert len(named) > 100
    assert [name for name in named if name not in defined] == []


@pytest.mark.skipif(find_spec("material") is None, reason="the extra `docs` is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "settings" / "index.html").exists()
