"""The OpenAPI document for tests: its operations, and whether a response matches it."""

import json
from functools import reduce
from operator import getitem

import jsonschema
from commands import ROOT

DOCUMENT = json.loads((ROOT / "detector" / "service" / "openapi.json").read_text())
OPERATIONS = {
    (method, path): operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
}


def resolve(part):
    """Follow `$ref` to its target."""
    while "$ref" in part:
        names = part["$ref"].removeprefix("#/").split("/")
        part = reduce(getitem, names, DOCUMENT)
    return part


def faults(schema, value):
    """Faults of a value by a schema of the document: [message]."""
    rules = jsonschema.Draft202012Validator(
        {"allOf": [schema], "components": DOCUMENT["components"]}
    )
    return [error.message for error in rules.iter_errors(value)]


def documented(method, path, status):
    return resolve(OPERATIONS[method.lower(), path]["responses"][str(status)])


def typed(schema, text):
    """A header's text in the type of its schema."""
    return int(text) if resolve(schema).get("type") == "integer" else text


def assert_as_documented(response, described):
    """A response of Flask's client or requests has the documented type, body and headers."""
    ((kind, content),) = described["content"].items()
    assert response.headers["Content-Type"].split(";")[0] == kind
    body = json.loads(response.text) if kind == "application/json" else response.text
    assert faults(content["schema"], body) == []
    for name, header in described["headers"].items():
        header = resolve(header)
        if header.get("required") or name in response.headers:
            value = typed(header["schema"], response.headers[name])
            assert faults(header["schema"], value) == [], name


def examples(part, where="document"):
    """Yield (where, schema, value) of every example in the document."""
    if isinstance(part, list):
        for number, inner in enumerate(part):
            yield from examples(inner, f"{where}.{number}")
    elif isinstance(part, dict):
        if "schema" in part:
            if "example" in part:
                yield where, part["schema"], part["example"]
            for name, example in part.get("examples", {}).items():
                yield f"{where}.{name}", part["schema"], example["value"]
        for name, inner in part.items():
            if name not in ("example", "examples"):
                yield from examples(inner, f"{where}.{name}")
