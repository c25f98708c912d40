"""The imports that each folder may have, no circles, short commands."""

import ast
from functools import cache

import pytest
from commands import ROOT

# folder of detector/ -> the folders that it may import, as in docs/development.md
MAY_IMPORT = {
    "base": "",
    "images": "base",
    "encoders": "base images",
    "features": "base images encoders",
    "model": "base",
    "verdict": "base images encoders model",
    "evaluation": "base images encoders features model verdict",
    "training": "base images encoders features model verdict evaluation",
    "finetuning": "base images encoders features",
    "service": "base images encoders model verdict",
    "registry": "base model evaluation",
}
LONGEST_MAIN = 40
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for place in (ROOT, ROOT / "detector", ROOT / "tools")
    for path in (place.glob("*.py") if place == ROOT else place.rglob("*.py"))
}
COMMANDS = [name for name in FILES if "." not in name and name != "common"]


@cache
def imports(name):
    """Files of the project that a file imports, at its top or in functions."""
    modules = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules & set(FILES)


def folder_of(name):
    return name.split(".")[1]


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("detector.")])
def test_the_library_imports_one_way_and_no_command(name):
    own = folder_of(name)
    for other in imports(name):
        assert other.startswith("detector."), f"{name} imports {other}, a command or a tool"
        allowed = folder_of(other) in (own, *MAY_IMPORT[own].split())
        assert allowed, f"{name} imports {other}"


def test_every_folder_has_a_rule():
    folders = {folder_of(name) for name in FILES if name.startswith("detector.")}
    assert folders - {"__init__"} == set(MAY_IMPORT)


def test_no_file_imports_in_a_circle():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for other in sorted(imports(name)):
                visit(other)
            done.add(path.pop())

    for name in FILES:
        visit(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_a_short_main_and_imports_no_command(name):
    body = ast.parse(FILES[name].read_text()).body
    (main,) = [node for node in body if getattr(node, "name", None) == "main"]
    assert main.end_lineno - main.lineno < LONGEST_MAIN
    assert imports(name).isdisjoint(COMMANDS)


def names_of(path):
    """Names that a file defines; imported names are not among them."""
    tree = ast.parse(path.read_text())
    names = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    stored = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    return names | {node.id for node in stored if isinstance(node.ctx, ast.Store)}


def borrowed(path):
    """(module, name) of each import of a name that the module itself only imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            own = names_of(FILES[node.module])
            yield from ((node.module, alias.name) for alias in node.names if alias.name not in own)


@pytest.mark.parametrize("place", ["detector", "tools", "benchmarks", "."])
def test_a_name_is_imported_from_the_file_that_defines_it(place):
    paths = (ROOT / place).glob("*.py") if place == "." else (ROOT / place).rglob("*.py")
    assert [(path.name, *pair) for path in paths for pair in borrowed(path)] == []


def test_every_package_file_is_empty():
    assert all(path.read_text() == "" for path in (ROOT / "detector").rglob("__init__.py"))
