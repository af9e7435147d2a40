from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy.cli import console
from proxy.cli.console import BadArgument, ConfigOption, DataDirOption, JsonOption, UrlOption, finite

if TYPE_CHECKING:
    from proxy.cli.client import Method
    from proxy.cli.deployed import Messages
    from proxy.settings.schema import Settings
    from router_core.calibration import BestSingleModel, LambdaSweep, SweepPoint


PROMPTS_HELP = """A sample of your traffic instead of the validation set: text (one prompt a line), JSONL (.gz too) or
Parquet files; repeatable."""

QUALITY_HELP = "Find the cheapest λ with this share of the best single model's expected quality, as 0.98."

BUDGET_HELP = "Find the best λ that is expected to cost no more than these USD per 1,000 requests."

QualityOption = Annotated[float | None, typer.Option("--quality", min=0.0, callback=finite, help=QUALITY_HELP)]

BudgetOption = Annotated[float | None, typer.Option("--budget-usd-per-1k", min=0.0, callback=finite, help=BUDGET_HELP)]

# Prompts of files that are looked at, drawn by chance with a fixed seed.
SAMPLE_SIZE = 5_000


def calibrate(
    quality: QualityOption = None,
    budget_usd_per_1k: BudgetOption = None,
    prompts: Annotated[list[Path] | None, typer.Option("--prompts", metavar="FILE", help=PROMPTS_HELP)] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
    url: UrlOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Find which λ to set, and what it should cost, by the profiles and prices of a running server.

    Give the configuration of that server: map, embedder, cost unit and validation set are read from it. Costs are those
    of the prompts' text, without system prompts, tools, earlier turns, or the middle of very long ones.
    """
    from proxy.cli.console import read_settings

    if (quality is None) == (budget_usd_per_1k is None):
        raise console.BadArgument("give --quality or --budget-usd-per-1k, and not both")
    settings = read_settings(config, data_dir=data_dir)
    traffic = read_traffic(settings, prompts or [])
    calibration = _calibration(settings, traffic, Goal(quality, budget_usd_per_1k), url)
    if as_json:
        console.emit_json(_document(calibration))
    else:
        _print(calibration)


@dataclass(frozen=True)
class Traffic:
    """Prompts to calibrate on, each as the messages of its conversation."""

    name: str
    prompts: Sequence[Messages]


def read_traffic(settings: Settings, paths: Sequence[Path]) -> Traffic:
    """Read the validation set of the settings, or a sample of files. Raises BadArgument, InvalidValidationSet."""
    from proxy.cli.console import check_prompt_files, read_prompts, read_validation_set
    from proxy.cli.deployed import user_turn

    if not paths:
        return Traffic("the validation set", [p.messages for p in read_validation_set(settings.validation_set)])
    check_prompt_files(paths)
    texts = sample(text for text in read_prompts(paths) if text.strip())
    if not texts:
        raise BadArgument(f"--prompts: there is no prompt in {', '.join(map(str, paths))}")
    return Traffic(", ".join(path.name for path in paths), [user_turn(text) for text in texts])


def sample(texts: Iterable[str], size: int = SAMPLE_SIZE) -> list[str]:
    """Draw at most `size` texts, each equally likely (reservoir sampling): a text that comes often counts as often."""
    import numpy as np

    rng, kept = np.random.default_rng(0), list[str]()
    for number, text in enumerate(texts):
        if number < size:
            kept.append(text)
        elif (place := int(rng.integers(number + 1))) < size:
            kept[place] = text
    return kept


@dataclass(frozen=True, slots=True)
class Goal:
    """What to reach; one of the two is None."""

    quality: float | None
    budget_usd_per_1k: float | None


@dataclass(frozen=True)
class Calibration:
    """The λ that was found, and the best single model beside it."""

    found: SweepPoint
    best: BestSingleModel
    interval: tuple[float, float] | None
    """Of `relative`, with 90 % confidence."""
    labels: Mapping[str, float]
    """Model → the number of labels that it was measured on."""
    traffic: Traffic
    cost_unit: str

    @property
    def relative(self) -> float | None:
        """Quality as a share of the best single model's; None where that is always wrong."""
        return self.found.quality / self.best.quality if self.best.quality > 0 else None


def _calibration(settings: Settings, traffic: Traffic, goal: Goal, url: str | None) -> Calibration:
    """Calibrate by the server's own rules: its text of a prompt, its estimate of tokens, its costs."""
    import numpy as np

    from proxy.cli.deployed import assign_conversations, load_deployment
    from proxy.routing.requirements import requirements_of
    from router_core.calibration import quality_interval, sweep_lambdas
    from router_core.scoring import ScoringParams

    cluster_map, embedder, pool = load_deployment(settings, url)
    with console.progress() as bars:
        assignment = assign_conversations(traffic.prompts, embedder, cluster_map, bars)
    tokens = [requirements_of({"messages": list(messages)}).prompt_tokens for messages in traffic.prompts]
    params = ScoringParams(
        latency_weight=settings.latency_weight, cost_unit=settings.cost_unit, reference=settings.reference_price
    )
    expected = sweep_lambdas(pool, assignment, np.array(tokens, dtype=np.float64), params)
    found = _find(expected, goal)
    interval = quality_interval(expected, found, pool, assignment)
    labels = {name: float(pool.total_labels[pool.index[name]]) for name in expected.models}
    return Calibration(found, expected.best_single(), interval, labels, traffic, settings.cost_unit)


def _find(expected: LambdaSweep, goal: Goal) -> SweepPoint:
    from router_core.calibration import best_within_budget, cheapest_for_quality

    if goal.quality is not None:
        return cheapest_for_quality(expected, goal.quality)
    return best_within_budget(expected, (goal.budget_usd_per_1k or 0.0) / 1e3)


def _document(calibration: Calibration) -> dict[str, Any]:
    found, best = calibration.found, calibration.best
    return {
        "lambda": found.lambda_,
        "quality": found.quality,
        "relative_quality": calibration.relative,
        "relative_interval": None if calibration.interval is None else list(calibration.interval),
        "usd_per_1k": 1e3 * found.usd,
        "best_single": {"model": best.model, "quality": best.quality, "usd_per_1k": 1e3 * best.usd},
        "shares": dict(found.shares),
        "prompts": len(calibration.traffic.prompts),
        "cost_unit": calibration.cost_unit,
    }


def _print(calibration: Calibration) -> None:
    found, best, traffic = calibration.found, calibration.best, calibration.traffic
    console.echo(f"λ = {found.lambda_:g}, expected over {len(traffic.prompts):,} prompts of {traffic.name}")
    rows = [
        (f"at λ = {found.lambda_:g}", f"{found.quality:.3f}", _share(calibration.relative), _usd(found.usd)),
        (f"always {best.model}, the best single model", f"{best.quality:.3f}", _share(1.0), _usd(best.usd)),
    ]
    console.table(("", "expected quality", "of the best", "$ per 1,000 requests"), rows)
    used = {name: share for name, share in found.shares.items() if share > 0}
    console.table(("model", "share of requests"), [(name, _share(share)) for name, share in used.items()])
    if never := [name for name in found.shares if name not in used]:
        console.echo(f"  none of them to {', '.join(never)}")
    if calibration.interval:
        console.echo(_interval_sentence(calibration, *calibration.interval))
    console.echo(f"to set it now, until it is reset: `uniroute lambda set {found.lambda_:g}`")
    console.echo(
        f"to set it for good: `lambda: {found.lambda_:g}` in the uniroute section (cost_unit: {calibration.cost_unit})"
    )
    console.echo(f"to try it: the header `lambda: {found.lambda_:g}` on any request for `auto`")


def _interval_sentence(calibration: Calibration, low: float, high: float) -> str:
    model, labels = min(calibration.labels.items(), key=lambda item: item[1])
    return (
        f"it may be {_share(low)} to {_share(high)} of the best (fewest labels: {labels:.0f}, {model}),"
        " and rather less than more: models are chosen by the estimates that they are judged by"
    )


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _usd(usd: float) -> str:
    return f"{1e3 * usd:,.4f}"


lambdas = typer.Typer(
    no_args_is_help=True, help="Show or set the default λ of a running server. Needs UNIROUTE_ADMIN_KEY."
)


@lambdas.command()
def show(url: UrlOption = None, *, as_json: JsonOption = False) -> None:
    """Show the λ of requests for which nothing else states one, and who set it."""
    _call("GET", url, as_json=as_json)


@lambdas.command("set")
def set_(
    value: Annotated[float, typer.Argument(metavar="LAMBDA", min=0.0, callback=finite, help="0 or more.")],
    url: UrlOption = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Set it in place of the configuration's, for all processes and replicas, until `reset`."""
    _call("PUT", url, {"lambda": value}, as_json=as_json)


@lambdas.command()
def reset(url: UrlOption = None, *, as_json: JsonOption = False) -> None:
    """Go back to the λ of the configuration."""
    _call("DELETE", url, as_json=as_json)


def _call(method: Method, url: str | None, body: Mapping[str, float] | None = None, *, as_json: bool) -> None:
    from proxy.cli.client import admin_client

    with admin_client(url) as server:
        found = server.call(method, "/admin/settings", body)["lambda"]
    if as_json:
        console.emit_json(found)
    elif found["source"] == "config":
        console.echo(f"λ = {found['value']:g}, of the configuration")
    else:
        who = f"{found['set_by'] or 'the server'} at {found['set_at']}"
        console.echo(f"λ = {found['value']:g}, set by {who}; the configuration has {found['configured']:g}")
