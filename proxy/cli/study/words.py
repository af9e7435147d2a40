"""What was run and what is undefined, in sentences. Plain text: whoever makes a page of it escapes it."""

from __future__ import annotations

from math import isnan

from proxy.cli.study.names import OURS
from router_core.evaluation.results import Protocol, Results

_STUDIED = "trial", "best new model", " The others are averaged."
_DEPLOYED = "bootstrap draw", "best model", " The intervals are of the others."


def middle(results: Results) -> int:
    """The N that is shown where there is room for one."""
    return results.protocol.labels[len(results.protocol.labels) // 2]


def columns(results: Results) -> list[str]:
    """What the columns of a table by N are called."""
    return [f"N = {labels}" for labels in results.protocol.labels]


def protocol_sentences(results: Results) -> list[str]:
    """What it was run on, how, and what a cost and an interval are."""
    protocol = results.protocol
    what = f"{protocol.outcomes}: {protocol.prompts:,} prompts, {len(protocol.models)} models."
    how = _study(protocol) if is_study(results) else _deployed(protocol)
    return [what, *how, _costs(protocol), _intervals(results)]


def is_study(results: Results) -> bool:
    """Not of deployed profiles: those are as they are, and there is nothing to choose prompts for."""
    return bool(results.chosen)


def _study(protocol: Protocol) -> list[str]:
    trials = "one trial" if protocol.trials == 1 else f"each of {protocol.trials} trials"
    who = (
        f"{protocol.new_models} models are new and {protocol.known_models} are known"
        if protocol.known_models
        else f"all {protocol.new_models} models are new, and none is known"
    )
    return [
        f"In {trials} (seed {protocol.seed}) {who}.",
        "A new model is seen through its answers to N prompts;"
        f" {protocol.test_prompts:,} others are routed, among the new models.",
    ]


def _deployed(protocol: Protocol) -> list[str]:
    return [
        f"{protocol.test_prompts:,} prompts that all of the models have a score on are routed by the deployed profiles,"
        f" of {protocol.labels[0]} labels on average (N)."
    ]


def _costs(protocol: Protocol) -> str:
    if protocol.measured_lengths:
        return "An answer is billed by its measured length, where the file has it."
    return "The file has no lengths of answers: the prompt alone is billed."


def _intervals(results: Results) -> str:
    protocol = results.protocol
    if not is_study(results):
        return (
            f"In brackets: 95 % intervals, by {protocol.trials} bootstrap draws of the prompts (seed {protocol.seed})."
        )
    alone = " One trial alone has none to speak of." if protocol.trials == 1 else ""
    return f"In brackets: 95 % bootstrap intervals of the mean over trials.{alone}"


def area_is_known(results: Results) -> bool:
    """Else there is nothing to draw, whatever the method and N: all lie between the same models."""
    return not all(isnan(figures.area.mean) for figures in results.methods[OURS].values())


def undefined_sentence(results: Results) -> str:
    """Empty where every trial defines Area. It lies between two models: with one that is both there is nothing."""
    of = results.protocol.trials
    defined = min(figures.area.trials for figures in results.methods[OURS].values())
    if defined >= of:
        return ""
    kind, best, rest = _STUDIED if is_study(results) else _DEPLOYED
    many = f"{of - defined} of {of} {kind}{'s' if of > 1 else ''}"
    return f"Area is undefined in {many}: the {best} was the cheapest.{rest if defined else ''}"
