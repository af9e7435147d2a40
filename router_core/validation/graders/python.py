"""Python that is parsed, never run: does the reply define what was asked, in the way that was asked?"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from router_core.validation.fields import Fields, JsonObject
from router_core.validation.graders.answers import fenced, visible

MAX_CODE_CHARS = 4_000

_FEATURES: dict[str, tuple[type[ast.AST], ...]] = {
    "loop": (ast.For, ast.While, ast.AsyncFor),
    "comprehension": (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp),
    "try": (ast.Try,),
    "raise": (ast.Raise,),
    "lambda": (ast.Lambda,),
    "yield": (ast.Yield, ast.YieldFrom),
    "import": (ast.Import, ast.ImportFrom),
    "with": (ast.With,),
    "if": (ast.If, ast.IfExp),
    "return": (ast.Return,),
}
FEATURES = (*_FEATURES, "recursion", "docstring", "annotations", "default")


@dataclass(frozen=True)
class PythonGrader:
    """Full marks when a function of this name and these arguments is defined, with the features in `uses`, none of
    those in `avoids`, and every name in `mentions` (a function, method or variable).
    """

    function: str
    arguments: tuple[str, ...]
    uses: tuple[str, ...] = ()
    avoids: tuple[str, ...] = ()
    mentions: tuple[str, ...] = ()
    type: ClassVar[str] = "python"

    def grade(self, answer: str) -> float:
        text = visible(answer)
        return float(any(self._fits(node) for code in (*fenced(text), text) for node in _functions(code)))

    def _fits(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        if node.name != self.function or tuple(arg.arg for arg in node.args.args) != self.arguments:
            return False
        present = {feature for feature in FEATURES if _has(node, feature)}
        if present & set(self.avoids) or not set(self.uses) <= present or _is_empty(node):
            return False
        return set(self.mentions) <= set(_names(node))

    def to_json(self) -> dict[str, object]:
        spec: dict[str, object] = {"type": self.type, "function": self.function, "arguments": list(self.arguments)}
        return spec | {name: list(value) for name in ("uses", "avoids", "mentions") if (value := getattr(self, name))}

    @classmethod
    def from_json(cls, spec: JsonObject) -> PythonGrader:
        fields = Fields(spec, ("type", "function", "arguments", "uses", "avoids", "mentions"), "grader.")
        uses, avoids = fields.texts("uses"), fields.texts("avoids")
        for key, features in (("uses", uses), ("avoids", avoids)):
            if not set(features) <= set(FEATURES):
                raise fields.wrong(key, f"a list out of {', '.join(FEATURES)}")
        return cls(fields.text("function"), fields.texts("arguments"), uses, avoids, fields.texts("mentions"))


def _functions(code: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in somebody's string literals
            tree = ast.parse(code[:MAX_CODE_CHARS])
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _has(node: ast.FunctionDef | ast.AsyncFunctionDef, feature: str) -> bool:
    if feature == "recursion":
        return any(isinstance(part, ast.Call) and node.name in _names(part.func) for part in ast.walk(node))
    if feature == "docstring":
        return ast.get_docstring(node) is not None
    if feature == "annotations":
        return node.returns is not None and all(arg.annotation is not None for arg in node.args.args)
    if feature == "default":
        return bool(node.args.defaults)
    return any(isinstance(part, _FEATURES[feature]) for part in ast.walk(node))


def _is_empty(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Only `pass`, `...` or a docstring."""
    constant = [isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) for part in node.body]
    return all(is_constant or isinstance(part, ast.Pass) for is_constant, part in zip(constant, node.body, strict=True))


def _names(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.alias):
            yield part.name
