"""The OpenAPI document as tests use it: where things stand in it, and whether an answer is as it says."""

import json

import jsonschema
from commands import ROOT

DOCUMENT = json.loads((ROOT / "detector" / "service" / "openapi.json").read_text())
OPERATIONS = {
    (method, path): operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
}


def resolve(part):
    """What a `$ref` stands for."""
    while "$ref" in part:
        found = DOCUMENT
        for name in part["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        part = found
    return part


def faults(schema, value):
    """What is wrong with a value by a schema of the document: [message]."""
    rules = jsonschema.Draft202012Validator(
        {"allOf": [schema], "components": DOCUMENT["components"]}
    )
    return [error.message for error in rules.iter_errors(value)]


def documented(method, path, status):
    return resolve(OPERATIONS[method.lower(), path]["responses"][str(status)])


def typed(schema, text):
    """A header's text as its schema has it."""
    return int(text) if resolve(schema).get("type") == "integer" else text


def assert_as_documented(response, described):
    """Flask's or requests' response against a response of the document: type, body, every header that must be there."""
    ((kind, content),) = described["content"].items()
    assert response.headers["Content-Type"].split(";")[0] == kind
    assert (
        faults(
            content["schema"],
            json.loads(response.text) if kind == "application/json" else response.text,
        )
        == []
    )
    for name, header in described["headers"].items():
        header = resolve(header)
        if header.get("required") or name in response.headers:
            assert (
                faults(header["schema"], typed(header["schema"], response.headers[name])) == []
            ), name


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
