"""Load a copy of `router_core` that counts its calls into NumPy, FAISS and the compiled kernels.

NumPy's operators, subscripts and ufuncs are no events of `sys.setprofile`, so the copy's source is rewritten: each
call, operator, comparison and subscript goes through a function here that looks whether an array is in it.
"""

from __future__ import annotations

import ast
import operator
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ARRAYS = (np.ndarray, np.generic)
HERE = "counting_numpy_calls"
NUMPY, FAISS, COMPILED = "NumPy", "FAISS", "compiled"

counted: Counter[str] = Counter()


def call(function: Any, *args: Any, **keywords: Any) -> Any:
    owner = getattr(function, "__self__", None)
    module = str(getattr(function, "__module__", None) or type(owner).__module__)
    if isinstance(owner, (*ARRAYS, np.ufunc)) or module.partition(".")[0] == "numpy":
        counted[NUMPY] += 1
    elif module.endswith("._compiled") or type(owner).__module__.endswith("._compiled"):
        counted[COMPILED] += 1
    elif module.partition(".")[0] == "faiss":
        counted[FAISS] += 1
    return function(*args, **keywords)


def binary(name: str, left: Any, right: Any) -> Any:
    counted[NUMPY] += isinstance(left, ARRAYS) or isinstance(right, ARRAYS)
    function: Callable[[Any, Any], Any] = getattr(operator, name)
    return function(left, right)


def unary(name: str, value: Any) -> Any:
    counted[NUMPY] += isinstance(value, ARRAYS)
    function: Callable[[Any], Any] = getattr(operator, name)
    return function(value)


def written(target: Any) -> Any:
    """Return what is subscripted to be written to."""
    counted[NUMPY] += isinstance(target, ARRAYS)
    return target


# `ast` node → function of `operator`.
BINARY = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "truediv", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.Pow: "pow", ast.MatMult: "matmul", ast.BitAnd: "and_", ast.BitOr: "or_", ast.BitXor: "xor",
    ast.LShift: "lshift", ast.RShift: "rshift", ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge",
    ast.Eq: "eq", ast.NotEq: "ne",
}  # fmt: skip
UNARY = {ast.Invert: "invert", ast.USub: "neg", ast.UAdd: "pos"}


class Counting(ast.NodeTransformer):
    """Send calls, operators, comparisons and subscripts of a module through this one. Annotations stay as they are."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.value = node.value and self.visit(node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        returns, node.returns = node.returns, None
        self.generic_visit(node)
        node.returns = returns
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "super":  # it looks at the frame that calls it
            return node
        return ast.copy_location(_through("call", [node.func, *node.args], node.keywords), node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        return ast.copy_location(_through("binary", [_text(BINARY[type(node.op)]), node.left, node.right]), node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        name = UNARY.get(type(node.op))
        return node if name is None else ast.copy_location(_through("unary", [_text(name), node.operand]), node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        name = BINARY.get(type(node.ops[0]))
        if name is None or len(node.ops) > 1:
            return node
        return ast.copy_location(_through("binary", [_text(name), node.left, node.comparators[0]]), node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        self.generic_visit(node)
        if not isinstance(node.target, ast.Name):
            return node
        name = f"i{BINARY[type(node.op)].removesuffix('_')}"
        value = _through("binary", [_text(name), ast.Name(node.target.id, ast.Load()), node.value])
        return ast.copy_location(ast.Assign([node.target], value), node)

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load):
            return ast.copy_location(_through("binary", [_text("getitem"), node.value, _index(node.slice)]), node)
        node.value = _through("written", [node.value])
        return node


def _index(node: ast.expr) -> ast.expr:
    """Write `a:b` as `slice(a, b)`, also within a tuple."""
    if isinstance(node, ast.Tuple):
        return ast.Tuple([_index(each) for each in node.elts], ast.Load())
    if not isinstance(node, ast.Slice):
        return node
    ends = [each or ast.Constant(None) for each in (node.lower, node.upper, node.step)]
    return ast.Call(ast.Name("slice", ast.Load()), ends, [])


def _text(name: str) -> ast.Constant:
    return ast.Constant(name)


def _through(name: str, args: list[ast.expr], keywords: list[ast.keyword] | None = None) -> ast.Call:
    return ast.Call(ast.Attribute(ast.Name(HERE, ast.Load()), name, ast.Load()), args, keywords or [])


def load_copy(source: Path, folder: Path, name: str, *, counting: bool = False) -> ModuleType:
    """Import a copy of the package in `source`, made in `folder` under another name, beside the package itself."""
    copy = folder / name
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "validation", "evaluation"))
    for path in copy.rglob("*.py"):
        text = path.read_text("utf-8").replace("router_core", name)
        path.write_text(_counting(text) if counting else text, "utf-8")
    sys.path.insert(0, str(folder))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(folder))


def _counting(text: str) -> str:
    tree = ast.fix_missing_locations(Counting().visit(ast.parse(text)))
    first = next(
        (place for place, node in enumerate(tree.body) if not isinstance(node, ast.Expr | ast.ImportFrom)),
        len(tree.body),
    )
    tree.body.insert(first, ast.parse(f"from tests.bench import numpy_calls as {HERE}").body[0])
    return ast.unparse(ast.fix_missing_locations(tree))
