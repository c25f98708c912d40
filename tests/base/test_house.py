"""The house: which folder may import which, no circles, thin commands."""

import ast
from functools import cache

import pytest
from commands import ROOT

# folder of detector/ -> the folders that it may import; docs/development.md draws it
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
EXCEPTIONS = {("service", "detector.evaluation.metrics")}  # the intervals
LONGEST_MAIN = 40
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for place in (ROOT, ROOT / "detector", ROOT / "tools")
    for path in (place.glob("*.py") if place == ROOT else place.rglob("*.py"))
}
COMMANDS = [name for name in FILES if "." not in name and name != "common"]


@cache
def imports(name):
    """Files of the project that this one imports, however late."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(FILES)


def folder_of(name):
    return name.split(".")[1]


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("detector.")])
def test_the_library_imports_one_way_and_no_command(name):
    own = folder_of(name)
    for other in imports(name):
        assert other.startswith("detector."), f"{name} imports {other}, a command or a tool"
        allowed = folder_of(other) in (own, *MAY_IMPORT[own].split()) or (own, other) in EXCEPTIONS
        assert allowed, f"{name} imports {other}"


def test_no_folder_is_without_a_rule():
    assert {folder_of(name) for name in FILES if name.startswith("detector.")} - {
        "__init__"
    } == set(MAY_IMPORT)


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
def test_a_command_parses_and_names_its_steps(name):
    functions = [
        node
        for node in ast.parse(FILES[name].read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    (main,) = [node for node in functions if node.name == "main"]
    assert main.end_lineno - main.lineno < LONGEST_MAIN
    assert imports(name).isdisjoint(COMMANDS), "a command imports no other"


def names_of(path):
    """What a file defines at its top level, without what it imports."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        found |= {
            name.id
            for name in ast.walk(node)
            if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
        }
    return found


def borrowed(path):
    """(module, name) of each import that names what the module itself does not define."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            own = names_of(FILES[node.module])
            yield from ((node.module, alias.name) for alias in node.names if alias.name not in own)


@pytest.mark.parametrize("place", ["detector", "tools", "benchmarks", "."])
def test_a_name_is_imported_from_where_it_is_defined(place):
    paths = (ROOT / place).glob("*.py") if place == "." else (ROOT / place).rglob("*.py")
    assert [(path.name, *pair) for path in paths for pair in borrowed(path)] == []


def test_every_package_file_is_empty():
    assert all(path.read_text() == "" for path in (ROOT / "detector").rglob("__init__.py"))
