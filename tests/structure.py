"""Measure how the code is built: `python -m tests.structure [ROOT]`, or `make structure`.

ROOT is a checkout, this one if not given; so that one commit can be compared with another:

    git worktree add /tmp/before COMMIT && python -m tests.structure /tmp/before
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "hf_llama_sampling"
LONG = 50  # lines of a function, its docstring apart
MANY = 8  # arguments of a function, self apart

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Measured(NamedTuple):
    """Something found in a file: its name, and a number of lines, arguments or attributes."""

    name: str
    size: int


def modules(root: Path) -> dict[str, Path]:
    """The package's modules by dotted name."""
    files = sorted((root / PACKAGE).rglob("*.py"))
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def functions(root: Path) -> Iterator[tuple[str, Function]]:
    """Every function and method with its qualified name, nested ones included."""

    def walk(node: ast.AST, name: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            inner = f"{name}.{child.name}" if isinstance(child, (Function, ast.ClassDef)) else name
            if isinstance(child, Function):
                yield inner, child
            yield from walk(child, inner)

    for module, file in modules(root).items():
        yield from walk(ast.parse(file.read_text()), module)


def lines_of(function: Function) -> int:
    """Lines from `def` to the end, without the docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if documented and ast.get_docstring(function) else 0
    return function.end_lineno - function.lineno + 1 - docstring


def long_functions(root: Path) -> list[Measured]:
    """Functions of more than `LONG` lines."""
    found = [Measured(name, lines_of(function)) for name, function in functions(root)]
    return sorted((one for one in found if one.size > LONG), key=lambda one: -one.size)


def functions_of_many_arguments(root: Path) -> list[Measured]:
    """Functions of more than `MANY` named arguments."""
    found = []
    for name, function in functions(root):
        named = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        found.append(Measured(name, sum(argument.arg not in ("self", "cls") for argument in named)))
    return sorted((one for one in found if one.size > MANY), key=lambda one: -one.size)


def state_objects(root: Path) -> list[Measured]:
    """Classes by the number of attributes that can change: assigned on `self`, or fields of a dataclass not frozen."""
    found = []
    for module, file in modules(root).items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                assigned = {
                    target.attr
                    for target in ast.walk(node)
                    if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store)
                    if isinstance(target.value, ast.Name) and target.value.id == "self"
                }
                fields = {
                    field.target.id
                    for field in node.body
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                }
                found.append(Measured(f"{module}.{node.name}", len(assigned | (fields if is_mutable(node) else set()))))
    return sorted(found, key=lambda one: -one.size)


def is_mutable(node: ast.ClassDef) -> bool:
    """Whether a class is a dataclass without `frozen=True`."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any("dataclass" in text and "frozen=True" not in text for text in decorators)


def imports_from_init(root: Path) -> list[str]:
    """Imports of names from an `__init__` above the importing module: what is low asks what is high."""
    known = modules(root)
    found = []
    for module, file in known.items():
        is_package = file.name == "__init__.py"
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                parts = module.split(".")
                up = node.level - is_package
                base = ".".join(parts[: len(parts) - up]) if node.level else ""
                source = ".".join(filter(None, [base, node.module]))
                above = module.startswith(f"{source}.") and known.get(source, file).name == "__init__.py"
                names = [alias.name for alias in node.names if f"{source}.{alias.name}" not in known]
                if above and names:
                    found.append(f"{module} imports {', '.join(names)} from {source}")
    return found


def count_lines(files: list[Path]) -> int:
    """Lines of text in these files."""
    return sum(len(file.read_text().splitlines()) for file in files)


def main() -> None:
    """Print the figures, and the names behind them."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent
    long, many, states = long_functions(root), functions_of_many_arguments(root), state_objects(root)
    upward = imports_from_init(root)
    print(f"functions over {LONG} lines (docstrings apart): {len(long)}")
    print(*(f"    {one.size:4d} {one.name}" for one in long), sep="\n")
    print(f"functions with more than {MANY} arguments: {len(many)}")
    print(*(f"    {one.size:4d} {one.name}" for one in many), sep="\n")
    print(f"largest state object: {states[0].size} attributes, {states[0].name}")
    print(*(f"    {one.size:4d} {one.name}" for one in states[1:4]), sep="\n")
    print(f"imports from an __init__ above: {len(upward)}")
    print(*(f"         {one}" for one in upward), sep="\n")
    print(f"lines of the package: {count_lines(list(modules(root).values()))} in {len(modules(root))} modules")
    tests = sorted((root / "tests").rglob("*.py"))
    print(f"lines of the tests: {count_lines(tests)}, the longest file {max(count_lines([file]) for file in tests)}")
    print(f"lines of README.md: {count_lines([root / 'README.md'])}")


if __name__ == "__main__":
    main()
