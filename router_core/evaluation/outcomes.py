from __future__ import annotations

import codecs
import gzip
import json
import zlib
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_core.documents import (
    MAX_LINE_BYTES,
    MAX_PRICES_BYTES,
    DocumentTooLarge,
    parse_json,
    read_bounded,
    short_repr,
)
from router_core.errors import InvalidOutcomes, InvalidPrice
from router_core.pricing import PriceColumns
from router_core.text import closest_name, estimate_tokens
from router_core.types import Doubles, Price, price_field

# Tokens or seconds of one answer. More is a mistake.
MAX_VALUE = 1e9

_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class OutcomeRow:
    """What the models made of one prompt. A model that is absent was not asked, or this figure was not measured."""

    prompt: str
    source: str
    """"" if not stated."""
    scores: Mapping[str, float]
    """In [0, 1]; at least one model."""
    output_tokens: Mapping[str, float]
    seconds: Mapping[str, float]


def read_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield pairs of "FILE, line N" and the line's JSON object, holding one line in memory at a time.

    A gzip file is recognised by its first bytes.

    Raises:
        InvalidOutcomes: a line is no JSON object, or the file cannot be read further.
    """
    try:
        with path.open("rb") as raw, _unzipped(raw) as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES + 1), b""), 1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if content.strip():
                    where = f"{path}, line {number}"
                    yield where, json_object(_text(content, where), where)
    except (EOFError, zlib.error):
        raise InvalidOutcomes(f"{path}: the gzip file is cut off or damaged; copy it again") from None
    except OSError as error:
        raise InvalidOutcomes(f"{path}: cannot be read ({error.strerror or error})") from None


def _unzipped(raw: BufferedReader) -> BufferedReader | gzip.GzipFile:
    return gzip.open(raw) if raw.peek(len(_GZIP)).startswith(_GZIP) else raw


def _text(line: bytes, where: str) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise InvalidOutcomes(f"{where}: is longer than {MAX_LINE_BYTES:,} bytes; write one JSON object a line")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise InvalidOutcomes(f"{where}: is not UTF-8 text at byte {error.start + 1}; save the file as UTF-8") from None


def json_object(text: str, where: str) -> dict[str, Any]:
    """Parse a JSON object, or raise InvalidOutcomes if `text` is anything else or states a name twice."""
    try:
        value = parse_json(text, _without_repeats)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise InvalidOutcomes(f"{where}: is not JSON ({error.msg} at {line}column {error.colno})") from None
    except ValueError as error:
        raise InvalidOutcomes(f"{where}: is not usable JSON ({error})") from None
    if not isinstance(value, dict):
        raise InvalidOutcomes(f"{where}: must be a JSON object; got {short_repr(value)}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice[:100]!r} is stated twice: keep one")
    return found


def parse_row(where: str, row: Mapping[str, Any]) -> OutcomeRow:
    """Check one row. Unknown fields are ignored.

    Raises:
        InvalidOutcomes: the message begins with `where`, and says the value and the fix.
    """
    prompt, source = row.get("prompt"), row.get("source")
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidOutcomes(f'{where}: needs "prompt", a text that is not empty; got {_got(row, "prompt")}')
    if not isinstance(source, str | None):
        raise InvalidOutcomes(f'{where}: "source" must be a text; got {short_repr(source)}')
    if not isinstance(row.get("scores"), Mapping) or not row["scores"]:
        raise InvalidOutcomes(f'{where}: needs "scores", such as {{"model-a": 1.0}}; got {_got(row, "scores")}')
    return OutcomeRow(
        prompt=prompt,
        source=source or "",
        scores=_numbers(where, row, "scores", 1.0, "scale it, or leave out who was not asked"),
        output_tokens=_numbers(where, row, "output_tokens", MAX_VALUE, "leave out what was not measured"),
        seconds=_numbers(where, row, "seconds", MAX_VALUE, "leave out what was not measured"),
    )


def _is_text(name: str) -> bool:
    """Return whether `name` can be encoded: JSON can state a lone surrogate, which cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _got(row: Mapping[str, Any], field: str) -> str:
    return short_repr(row[field]) if field in row else "none"


def _numbers(where: str, row: Mapping[str, Any], field: str, most: float, fix: str) -> Mapping[str, float]:
    values = row.get(field)
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise InvalidOutcomes(
            f'{where}: "{field}" must be an object, a number for each model; got {short_repr(values)}'
        )
    for model, value in values.items():
        if not _is_text(model):
            raise InvalidOutcomes(
                f"{where}: {field} names {short_repr(model)}, a lone surrogate; write the name as UTF-8"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise InvalidOutcomes(
                f"{where}: {field}[{short_repr(model)}] must be a number from 0 to {most:g};"
                f" got {short_repr(value)}; {fix}"
            )
    return {model: float(value) for model, value in values.items()}


_NEEDED = ("input_cost_per_token", "output_cost_per_token")


def read_prices(path: Path) -> dict[str, Price]:
    """Read `{"model-a": {"input_cost_per_token": 1e-6, "output_cost_per_token": 3e-6}}`; other fields are ignored.

    Raises:
        InvalidOutcomes: the message names the file, and the model whose price cannot be used.
    """
    try:
        content = read_bounded(path, MAX_PRICES_BYTES)
        document = json_object(content.removeprefix(codecs.BOM_UTF8).decode(), str(path))
    except OSError as error:
        raise InvalidOutcomes(f"{path}: cannot be read ({error.strerror or error})") from None
    except DocumentTooLarge as error:
        raise InvalidOutcomes(f"{path}: {error}") from None
    except UnicodeDecodeError:
        raise InvalidOutcomes(f"{path}: is not UTF-8 text; a prices file is a JSON object of models") from None
    return {model: _price(stated, f"{path}: the price of {short_repr(model)}") for model, stated in document.items()}


def _price(stated: Any, where: str) -> Price:
    if not isinstance(stated, Mapping):
        raise InvalidOutcomes(f"{where} must be an object with {' and '.join(_NEEDED)}; got {short_repr(stated)}")
    costs = {name: cost for name, cost in stated.items() if cost is not None and price_field(name)}
    for name in _NEEDED:
        if name not in costs:
            raise InvalidOutcomes(f"{where} lacks {name}: add it in USD per token, 0 if it is free")
    for name, cost in costs.items():
        if isinstance(cost, bool) or not isinstance(cost, int | float):
            raise InvalidOutcomes(f"{where}: {name} must be a number, USD per token; got {short_repr(cost)}")
    try:
        return Price.from_fields(costs)
    except InvalidPrice as error:
        raise InvalidOutcomes(f"{where}: {error}") from None


Selection = NDArray[np.int64] | NDArray[np.bool_] | slice

# No nearest name is suggested out of more names: comparing takes a tenth of a millisecond each.
MAX_COMPARED = 1000

# Models that one message names; the others are counted.
MAX_NAMED = 5


@dataclass(frozen=True, eq=False)
class Outcomes:
    """n distinct prompts and M models. Every prompt has at least one score, and in a whole file so has every model."""

    prompts: tuple[str, ...]
    models: tuple[str, ...]
    """Sorted."""
    scores: Doubles
    """(n, M) in [0, 1]; NaN if the model was not asked, which is not an error."""
    prompt_tokens: Doubles
    """(n,) estimated from the text."""
    output_tokens: Doubles
    """(n, M); NaN where not measured."""
    prices: tuple[Price, ...]
    sources: tuple[str, ...]
    """"" if not stated."""

    def usd(self) -> Doubles:
        """Return the (n, M) USD that each answer cost, never NaN.

        A length that was not measured is taken to be the model's mean among these prompts; if none was measured, only
        the prompt is billed. Bill before selecting rows, or the mean changes with the selection.
        """
        return PriceColumns.from_prices(self.prices).expected_usd(self.prompt_tokens[:, None], self._billed_tokens())

    def _billed_tokens(self) -> Doubles:
        measured = ~np.isnan(self.output_tokens)
        sums = np.where(measured, self.output_tokens, 0.0).sum(axis=0)
        means = sums / np.maximum(measured.sum(axis=0), 1)
        return np.where(measured, self.output_tokens, means)

    def select(self, rows: Selection, columns: Selection | None = None) -> Outcomes:
        """Return these prompts and models alone, in the order of the indices, or of the file for a mask or slice."""
        kept = np.arange(len(self.prompts))[rows]
        among = np.arange(len(self.models))[slice(None) if columns is None else columns]
        return Outcomes(
            prompts=tuple(self.prompts[row] for row in kept),
            models=tuple(self.models[column] for column in among),
            scores=self.scores[np.ix_(kept, among)],
            prompt_tokens=self.prompt_tokens[kept],
            output_tokens=self.output_tokens[np.ix_(kept, among)],
            prices=tuple(self.prices[column] for column in among),
            sources=tuple(self.sources[row] for row in kept),
        )


def read_outcomes(outcomes: Path, prices: Path) -> Outcomes:
    """Read an outcomes file (JSONL, gzipped or not) and its prices file (JSON).

    Lines with exactly the same prompt become one prompt, with the mean of each model's scores and lengths. So files of
    one model each may simply be joined, and no prompt can be on both sides of a train and test split. Ids are ignored.

    Raises:
        InvalidOutcomes: the message names the file and the line, or the model, and what would fix it.
    """
    table = _Table(str(outcomes), str(prices))
    return table.collect(read_rows(outcomes), read_prices(prices))


def outcomes_from_rows(rows: Iterable[tuple[str, Mapping[str, Any]]], prices: Mapping[str, Price]) -> Outcomes:
    """Build the same from (where, row) pairs; `where`, as "FILE, line 3", begins the message of an error in the row."""
    return _Table("the outcomes", "the prices").collect(rows, prices)


class _Column:
    """One model's scores, or lengths, in the order of reading. A prompt may have several."""

    def __init__(self, where: str) -> None:
        # Where the first one stands, for messages.
        self.where = where
        self._prompts, self._values = array("q"), array("d")

    def add(self, prompt: int, value: float) -> None:
        self._prompts.append(prompt)
        self._values.append(value)

    def means(self, prompts: int) -> Doubles:
        """Return the (prompts,) means; NaN for a prompt without a value."""
        counts = np.bincount(self._prompts, minlength=prompts)
        sums = np.bincount(self._prompts, weights=self._values, minlength=prompts)
        return np.asarray(np.divide(sums, counts, out=np.full(prompts, np.nan), where=counts > 0))


@dataclass
class _Table:
    """Collects outcomes. `name` and `prices_name` begin the messages that are about no single line."""

    name: str
    prices_name: str
    prompts: dict[str, int] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    scores: dict[str, _Column] = field(default_factory=dict)
    output_tokens: dict[str, _Column] = field(default_factory=dict)

    def collect(self, rows: Iterable[tuple[str, Mapping[str, Any]]], prices: Mapping[str, Price]) -> Outcomes:
        for where, row in rows:
            self._add(where, parse_row(where, row))
        self._check_models()
        self._check_prices(prices)
        models = tuple(sorted(self.scores))
        return Outcomes(
            prompts=tuple(self.prompts),
            models=models,
            scores=self._matrix(self.scores, models),
            prompt_tokens=np.array([estimate_tokens(prompt) for prompt in self.prompts], dtype=np.float64),
            output_tokens=self._matrix(self.output_tokens, models),
            prices=tuple(prices[model] for model in models),
            sources=tuple(self.sources),
        )

    def _add(self, where: str, row: OutcomeRow) -> None:
        prompt = self.prompts.setdefault(row.prompt, len(self.prompts))
        if prompt == len(self.sources):
            self.sources.append("")
        self.sources[prompt] = self.sources[prompt] or row.source
        for columns, values in ((self.scores, row.scores), (self.output_tokens, row.output_tokens)):
            for model, value in values.items():
                if model not in columns:
                    columns[model] = _Column(where)
                columns[model].add(prompt, value)

    def _matrix(self, columns: Mapping[str, _Column], models: Sequence[str]) -> Doubles:
        matrix = np.full((len(self.prompts), len(models)), np.nan)
        for number, model in enumerate(models):
            if model in columns:
                matrix[:, number] = columns[model].means(len(matrix))
        return matrix

    def _check_models(self) -> None:
        if not self.scores:
            raise InvalidOutcomes(f"{self.name}: there is no prompt in it; write one JSON object a line")
        if len(self.scores) == 1:
            only = short_repr(*self.scores)
            raise InvalidOutcomes(f"{self.name}: {only} is the only model scored; routing needs two models or more")
        for model, column in self.output_tokens.items():
            if model not in self.scores:
                unscored = f"output_tokens has {short_repr(model)}, which no line scores; take it out"
                raise InvalidOutcomes(f"{column.where}: {unscored}{_nearest(model, self.scores)}")

    def _check_prices(self, prices: Mapping[str, Price]) -> None:
        for model, column in self.scores.items():
            if model not in prices:
                unpriced = f"{short_repr(model)} is scored but has no price; add it to {self.prices_name}"
                raise InvalidOutcomes(f"{column.where}: {unpriced}{_nearest(model, prices)}")
        if unscored := sorted(prices.keys() - self.scores.keys()):
            vain = (
                f"{short_repr(unscored[0])} is priced but no line of {self.name} scores it; take it out of the prices"
            )
            others = f", and so with {_join_names(unscored[1:])}" if len(unscored) > 1 else ""
            raise InvalidOutcomes(f"{self.prices_name}: {vain}{others}")


def _nearest(word: str, known: Collection[str]) -> str:
    closest = closest_name(word, known) if len(known) <= MAX_COMPARED else None
    return f" (did you mean {short_repr(closest)}?)" if closest else ""


def _join_names(models: Sequence[str]) -> str:
    more = f" and {len(models) - MAX_NAMED} more" if len(models) > MAX_NAMED else ""
    return ", ".join(map(short_repr, models[:MAX_NAMED])) + more
