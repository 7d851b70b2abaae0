"""What holds of every body, query and field: a limit that is looked at before anything is read or stored."""

from __future__ import annotations

import json
import re

import pytest

from tests.release_server.api.test_edges import methods_of

BODILESS = {"HEAD", "GET", "DELETE"}
LENGTH = {"maxLength", "enum", "const"}


class Unread:
    """A body that nobody may touch."""

    def read(self, *_):
        pytest.fail("the body was read")

    readline = readinto = read


def routes(app):
    """(method, path) of every route of the API, with what fits in the place of each argument."""
    for rule in app.url_map.iter_rules():
        if rule.rule.startswith("/api/v1"):
            path = re.sub(r"<sha256>", "0" * 64, rule.rule)
            path = re.sub(r"<(?:int:)?id>", "1", path)
            path = re.sub(r"<(?:\w+:)?\w+>", "x", path)
            yield from ((method, path.removeprefix("/api/v1")) for method in sorted(methods_of(rule)))


def with_body(app):
    return [route for route in routes(app) if route[0] not in BODILESS]


def body_of(schema, document):
    """The object schema behind a reference."""
    return (
        document["components"]["schemas"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    )


# --- what arrives ----------------------------------------------------------------------------------------


def test_a_body_over_its_limit_is_refused_before_it_is_read(app, config, sign_in):
    call = sign_in("admin")
    most = max(config.body_limit, config.metadata_limit, config.upload_limit)
    asked = with_body(app)
    assert len(asked) > 25
    for method, path in asked:
        answer = call(
            method,
            path,
            headers={"Upload-Offset": "0", "Upload-Length": "10", "Content-Type": "application/json"},
            environ_overrides={"wsgi.input": Unread(), "CONTENT_LENGTH": str(most + 1)},
        )
        assert answer.status_code == 413, f"{method} {path}: {answer.status_code}"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("[" * 100_000, id="deep lists"),
        pytest.param('{"a":' * 100_000, id="deep objects"),
        pytest.param("9" * 100_000, id="a long number"),
        pytest.param('{"reason": "\\ud800"}', id="half a surrogate pair"),
        pytest.param('{"reason": "\\u0000"}', id="NUL"),
        pytest.param("{" + ",".join(f'"k{n}":{n}' for n in range(20_000)) + "}", id="many keys"),
        pytest.param("\xff\xfe", id="no text"),
        pytest.param("NaN", id="no JSON"),
    ],
)
def test_hostile_json_is_refused_by_every_route(app, sign_in, clock, body):
    call = sign_in("admin")
    for method, path in with_body(app):
        clock.step(minutes=1)
        answer = call(method, path, data=body.encode("latin-1"), content_type="application/json")
        assert answer.status_code in (400, 401, 404, 422), f"{method} {path}: {answer.status_code}"
        assert answer.content_type == "application/problem+json", f"{method} {path}"


def test_an_unknown_query_is_refused_wherever_one_is_taken(app, client, sign_in):
    call = sign_in("admin")
    document = client.get("/api/v1/openapi.json").json
    taken = [
        path.removeprefix("/api/v1").replace("{product}/{name}", "x/x").replace("{id}", "1")
        for path, operations in document["paths"].items()
        if any(entry["in"] == "query" for entry in operations.get("get", {}).get("parameters", []))
    ]
    assert len(taken) > 5
    for path in taken:
        assert call("GET", f"{path}?unheard-of=1").status_code == 422, path


DEVICES = {
    # A newer agent may say more to an older server: it passes over what it does not know.
    "POST /enroll",
    "POST /report",
    "POST /rotate-key",
    "POST /lease",
    "POST /share",
}
SIGNED = {
    # Signed bytes are kept as they are; what is in them is the business of TUF's own reader.
    "POST /metadata/targets",
    "POST /proposals",
    "PUT /trust/root",
    "PATCH /uploads/" + "0" * 64,
}


def test_an_unknown_field_is_refused_by_its_name_wherever_a_person_sends_a_body(app, sign_in, clock):
    """A misspelt field that is passed over is a wish that nobody hears, for an approval as for a limit."""
    call = sign_in("admin")
    asked = {f"{method} {path}" for method, path in with_body(app)}
    assert asked >= DEVICES | SIGNED
    passed_over = []
    for route in sorted(asked - DEVICES - SIGNED):
        clock.step(minutes=1)
        answer = call(*route.split(), json={"unheard_of": 1})
        if answer.status_code not in (400, 422) or "unheard_of" not in answer.text:
            passed_over.append(f"{route}: {answer.status_code} {answer.text.strip()}")
    assert passed_over == []


# --- what the document promises --------------------------------------------------------------------------


def unbounded(schema, place):
    """Where a schema has a text, list, object or number of any size."""
    match schema:
        case {"type": "string"} if not LENGTH & schema.keys() and not is_bounded(schema.get("pattern")):
            yield place
        case {"type": "array"} if "maxItems" not in schema:
            yield place
        case {"type": "object"} if (
            schema.get("additionalProperties") is not False and "maxProperties" not in schema
        ):
            yield place
        case {"type": "integer" | "number"} if not {"maximum", "exclusiveMaximum", "enum"} & schema.keys():
            yield place
    for key in ("properties", "$defs"):
        for name, inner in schema.get(key, {}).items():
            yield from unbounded(inner, f"{place}.{name}")
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        for inner in schema.get(key, ()):
            yield from unbounded(inner, place)
    for key in ("items", "additionalProperties", "propertyNames"):
        if isinstance(schema.get(key), dict):
            yield from unbounded(
                schema[key] | ({"type": "string"} if key == "propertyNames" else {}), f"{place}.{key}"
            )


def is_bounded(pattern):
    """Whether a pattern is anchored and repeats nothing without end."""
    if pattern is None or not (pattern.startswith("^") and pattern.endswith("$")):
        return False
    outside = re.sub(r"\[[^\]]*\]", "x", pattern)
    return not re.search(r"(?<!\\)[*+]|\{\d+,\}", outside)


def taken_in(document):
    """(where, schema) of everything that a route takes and the document describes by its own schema."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            for entry in operation.get("parameters", []):
                yield f"{where} {entry['name']}", entry["schema"]
            for content in operation.get("requestBody", {}).get("content", {}).values():
                if "$ref" in content["schema"]:
                    yield where, body_of(content["schema"], document)


def resolved(schema, document):
    """The schema with every reference in its place."""
    text = json.dumps(schema)
    while found := re.search(r'\{"\$ref": "#/components/schemas/(\w+)"\}', text):
        inner = json.dumps(document["components"]["schemas"][found[1]])
        text = text[: found.start()] + inner + text[found.end() :]
    return json.loads(text)


def test_every_field_of_every_body_and_query_has_a_limit(client):
    document = client.get("/api/v1/openapi.json").json
    places = [
        place
        for where, schema in taken_in(document)
        for place in unbounded(resolved(schema, document), where)
    ]
    assert places == []


def test_the_search_for_missing_limits_finds_each_kind():
    schema = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "text": {"type": "string"},
            "form": {"type": "string", "pattern": "^[a-z]+$"},
            "list": {"type": "array", "items": {"type": "string", "maxLength": 3}},
            "map": {"type": "object", "maxProperties": 3, "additionalProperties": {"type": "string"}},
            "number": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "well": {"type": "string", "pattern": "^[a-z+*]{0,63}$"},
        },
    }
    found = ["x.text", "x.form", "x.list", "x.map.additionalProperties", "x.number"]
    assert list(unbounded(schema, "x")) == found
