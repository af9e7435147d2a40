"""Say what a program prints. The output is computed beside the program's text, which is never run."""

from __future__ import annotations

from random import Random

from router_core.validation.families.helpers import LONG, Draft, Section, by_levels
from router_core.validation.graders import ExactGrader

# Language, source, output.
Program = tuple[str, str, str]

_FRAMES = (
    "What does this {language} program print?\n\n```{tag}\n{code}\n```",
    "```{tag}\n{code}\n```\nGive the exact output and nothing else.",
    "Predict the output of the following {language} code:\n{code}\n\nReply with the output only.",
    (
        "I ran this {language} snippet:\n\n```{tag}\n{code}\n```\n\nWhat appeared on the screen? Put the output in a"
        " code block."
    ),
)


def _slice(rng: Random) -> Program:
    word, a, b = (
        rng.choice(["keyboard", "sunflower", "notebook", "framework", "pineapple"]),
        rng.randint(0, 3),
        rng.randint(4, 7),
    )
    return "Python", f'word = "{word}"\nprint(word[{a}:{b}] + word[-1])', word[a:b] + word[-1]


def _comparison(rng: Random) -> Program:
    a, b = rng.randint(2, 30), rng.randint(2, 30)
    return (
        "Python",
        f'a, b = {a}, {b}\nprint("big" if a * 2 > b else "small", a % 5)',
        f"{'big' if a * 2 > b else 'small'} {a % 5}",
    )


def _join_js(rng: Random) -> Program:
    values = rng.sample(range(1, 20), 4)
    code = f"const xs = {values};\nconsole.log(xs.map(x => x + 1).join('-'));"
    return "JavaScript", code, "-".join(str(value + 1) for value in values)


def _loop(rng: Random) -> Program:
    start, stop, step = rng.randint(1, 5), rng.randint(14, 30), rng.randint(2, 5)
    code = f"total = 0\nfor i in range({start}, {stop}, {step}):\n    if i % 2 == 1:\n        total += i\nprint(total)"
    return "Python", code, str(sum(i for i in range(start, stop, step) if i % 2 == 1))


def _counts(rng: Random) -> Program:
    word = "".join(rng.choices("abcd", k=9))
    code = (
        f'counts = {{}}\nfor letter in "{word}":\n    counts[letter] = counts.get(letter, 0) + 1\n'
        "print(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[0])"
    )
    best = sorted(((letter, word.count(letter)) for letter in set(word)), key=lambda item: (-item[1], item[0]))[0]
    return "Python", code, str(best)


def _c_while(rng: Random) -> Program:
    n = rng.randint(40, 900)
    code = (
        f"#include <stdio.h>\nint main(void) {{\n    int n = {n}, steps = 0;\n    while (n > 0) {{ n /= 3; steps++;"
        ' }\n    printf("%d\\n", steps);\n}'
    )
    steps, left = 0, n
    while left > 0:
        left, steps = left // 3, steps + 1
    return "C", code, str(steps)


def _recursion(rng: Random) -> Program:
    n, base = rng.randint(6, 10), rng.randint(1, 3)
    values = [base, base + 1]
    while len(values) <= n:
        values.append(values[-1] + 2 * values[-2])
    code = f"def f(n):\n    if n < 2:\n        return n + {base}\n    return f(n - 1) + 2 * f(n - 2)\n\nprint(f({n}))"
    return "Python", code, str(values[n])


def _mutable(rng: Random) -> Program:
    a, b, c = rng.sample(range(1, 40), 3)
    code = (
        "def add(item, seen=[]):\n    seen.append(item)\n    return len(seen) * item\n\n"
        f"print(add({a}), add({b}), add({c}, []))\nx = y = [{a}]\ny += [{b}]\nprint(x)"
    )
    return "Python", code, f"{a} {2 * b} {c}\n[{a}, {b}]"


def _generator(rng: Random) -> Program:
    seed, limit = rng.randint(5, 15), rng.randint(60, 200)
    code = (
        "def walk(n):\n    while n != 1:\n        yield n\n        n = n // 2 if n % 2 == 0 else 3 * n + 1\n\n"
        f"print(sum(1 for n in walk({seed}) if n < {limit}), max(walk({seed})))"
    )
    values, n = [], seed
    while n != 1:
        values.append(n)
        n = n // 2 if n % 2 == 0 else 3 * n + 1
    return "Python", code, f"{sum(1 for value in values if value < limit)} {max(values)}"


def _closures(rng: Random) -> Program:
    count, factor = rng.randint(3, 5), rng.randint(2, 9)
    code = f"fs = [lambda x: x * i for i in range({count})]\nprint([f({factor}) for f in fs])"
    return "Python", code, str([factor * (count - 1)] * count)


_PROGRAMS = ((_slice, _comparison, _join_js), (_loop, _counts, _c_while), (_recursion, _mutable, _generator, _closures))


def _draw(rng: Random, level: int) -> Draft:
    language, code, output = rng.choice(_PROGRAMS[level - 1])(rng)
    text = rng.choice(_FRAMES).format(language=language, tag=language.lower(), code=code)
    return Draft(text, ExactGrader((output,), case_sensitive=True), f"```\n{output}\n```", level, LONG)


SECTIONS = (Section("code_output", 18, by_levels(_draw)),)
