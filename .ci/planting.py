"""The faults that `.ci/mutants.py` plants, each a small change: in Python by its syntax tree, in C++ by its tokens."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

OPERATORS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "is not": "is", "in": "not in",
    "not in": "in", "+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "*", "**": "*", "|": "&", "&": "|",
    "and": "or", "or": "and",
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum", "floor": "ceil",
    "argmin": "argmax", "argmax": "argmin", "sin": "cos", "zeros_like": "ones_like", "ones_like": "zeros_like",
}  # fmt: skip
TOKENS = {
    "<<": ">>", ">>": "<<", "<=": "<", ">=": ">", "<": "<=", ">": ">=", "==": "!=", "!=": "==", "&&": "||", "||": "&&",
    "+": "-", "-": "+", "*": "+", "/": "*", "&": "|", "|": "&", "^": "&", "+=": "-=", "^=": "|=", "true": "false",
    "|=": "&=",
}  # fmt: skip


class Mutant(NamedTuple):
    """Replace text[start:end] by `new`."""

    line: int
    start: int
    end: int
    new: str

    def applied(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]


def python_mutants(text: str) -> list[Mutant]:
    """Operators, constants, conditions, returned values, arguments, slices and removed statements; no message."""
    return sorted(set(_Faults(text).found))


class _Faults(ast.NodeVisitor):
    def __init__(self, text: str) -> None:
        self.text, self.found = text, list[Mutant]()
        self.lines = [0]
        for line in text.encode().splitlines(keepends=True):  # columns count bytes
            self.lines.append(self.lines[-1] + len(line.decode()))
        self.visit(ast.parse(text))

    def at(self, line: int, column: int) -> int:
        start = self.lines[line - 1]
        return start + len(self.text[start : self.lines[line]].encode()[:column].decode())

    def start(self, node: ast.expr | ast.stmt) -> int:
        return self.at(node.lineno, node.col_offset)

    def end(self, node: ast.expr | ast.stmt) -> int:
        return self.at(node.end_lineno or 0, node.end_col_offset or 0)

    def source(self, node: ast.expr | ast.stmt) -> str:
        return self.text[self.start(node) : self.end(node)]

    def add(self, node: ast.expr | ast.stmt, new: str, start: int | None = None, end: int | None = None) -> None:
        start, end = self.start(node) if start is None else start, self.end(node) if end is None else end
        self.found.append(Mutant(self.text.count("\n", 0, start) + 1, start, end, new))

    def between(self, left: ast.expr, right: ast.expr) -> None:
        """Exchange the operator that stands between two expressions."""
        start, end = self.end(left), self.start(right)
        match = re.search(r"is\s+not|not\s+in|\w+|\*\*|//|[<>=!]=|[-+*/%<>|&]", self.text[start:end])
        new = OPERATORS.get(" ".join(match.group().split())) if match else None
        if match and new:
            self.add(left, new, start + match.start(), start + match.end())

    def condition(self, test: ast.expr) -> None:
        if not isinstance(test, (ast.Compare, ast.BoolOp, ast.Constant)):
            self.add(test, f"(not ({self.source(test)}))")

    # What is not looked into: annotations, decorators, docstrings, the texts of errors.

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)):
            self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    def visit_Assert(self, node: ast.Assert) -> None:
        pass

    def visit_Raise(self, node: ast.Raise) -> None:
        self.add(node, "pass")

    # Statements.

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, (ast.Call, ast.Yield)):
            self.add(node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add(node, "pass")
        self.between(node.target, node.value)
        self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if all(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets):
            self.add(node, "pass")
        self.generic_visit(node)

    def visit_Continue(self, node: ast.Continue) -> None:
        self.add(node, "pass")

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not isinstance(node.value, ast.Constant):
            self.add(node, "return None")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self.condition(node.test)
        self.generic_visit(node)

    # Expressions.

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.add(node, f"({self.source(node.orelse)} if {self.source(node.test)} else {self.source(node.body)})")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, right in zip([node.left, *node.comparators], node.comparators):
            self.between(left, right)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.between(node.left, node.right)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:]):
            self.between(left, right)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
            self.add(node, f"({self.source(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add(node, str(not node.value))
        elif isinstance(node.value, (int, float)):
            self.add(node, f"({self.source(node)} + 1)")

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in NAMES:
            self.add(node.func, NAMES[name], self.end(node.func) - len(name))
        plain = not any(isinstance(a, (ast.Starred, ast.Constant)) for a in node.args[:2])
        if len(node.args) >= 2 and plain and name not in ("isinstance", "getattr", "hasattr", *NAMES):
            first, second = node.args[:2]
            middle = self.text[self.end(first) : self.start(second)]
            self.add(first, self.source(second) + middle + self.source(first), end=self.end(second))
        self.generic_visit(node)

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None:
                self.add(bound, "")
        self.generic_visit(node)


def header_mutants(text: str) -> list[Mutant]:
    """Operators and constants of a C++ header, in what the CPU compiles of it: no comment, preprocessor or CUDA."""
    blank = re.sub(r"//[^\n]*", lambda m: " " * len(m.group()), text)
    blank = re.sub(r"(?m)^#if defined\(__CUDA(?:CC|_ARCH)__\)(?:\n(?!#(?:else|elif|endif)).*)*", _spaces, blank)
    blank = re.sub(r"(?m)^#.*(?:\\\n.*)*", _spaces, blank)
    blank = re.sub(r"\btemplate <[^>]*>|\w+\*+ |\b(?:const )?\w+&+ |\breinterpret_cast<[^>]*>", _spaces, blank)
    return sorted(_tokens(blank))


def _spaces(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match.group())


def _tokens(text: str) -> Iterator[Mutant]:
    number = r"(?<![\w.])(?:0[xX][0-9a-fA-F]+u?|\d+\.\d+(?:e-?\d+)?f?|\d+u?)(?![\w.])"
    for match in re.finditer(rf"{number}|\btrue\b|[-+^|]=|<<|>>|[<>=!]=|&&|\|\||[-+*/&|^<>]", text):
        token = match.group()
        if token in TOKENS:
            new = TOKENS[token]
        elif "." in token:
            new = f"({token} * 1.0001{'f' if token.endswith('f') else ''})"
        elif token[0].isdigit():
            new = f"({token} + 1)"
        else:
            continue
        yield Mutant(text.count("\n", 0, match.start()) + 1, match.start(), match.end(), new)
