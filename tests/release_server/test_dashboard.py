"""The page operators look at, as a browser gets it; what it shows comes from the API alone."""

from __future__ import annotations

import re
import shutil
import subprocess
from hashlib import sha256
from html.parser import HTMLParser

import pytest
from werkzeug.exceptions import HTTPException

from release_server.dashboard import STATIC

FILES = [
    ("/", "index.html", "text/html; charset=utf-8"),
    ("/dashboard/page.css", "page.css", "text/css; charset=utf-8"),
    ("/dashboard/page.js", "page.js", "text/javascript; charset=utf-8"),
]
files = pytest.mark.parametrize(("path", "name", "kind"), FILES, ids=[name for _, name, _ in FILES])
SCRIPT = (STATIC / "page.js").read_text()
MARKUP = (STATIC / "index.html").read_text()
STYLE = (STATIC / "page.css").read_text()
STARTS_MARKUP = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "srcdoc")
STARTS_CODE = ("eval(", "new Function", "import(", "javascript:", 'setTimeout("', "Worker(")


class Elements(HTMLParser):
    """Every element with its attributes, and whatever stands inside a script or style."""

    def __init__(self, markup):
        super().__init__()
        self.found = []
        self.inline = ""
        self._open = ""
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open in ("script", "style"):
            self.inline += data.strip()


@pytest.fixture(scope="module")
def elements():
    return Elements(MARKUP)


# --- how it is served ------------------------------------------------------------------------------------


@files
def test_each_file_is_served_as_it_is_to_anyone(client, path, name, kind):
    answer = client.get(path)
    assert (answer.status_code, answer.content_type) == (200, kind)
    assert answer.data == (STATIC / name).read_bytes()


@files
def test_a_browser_loads_and_asks_nothing_from_elsewhere(client, path, name, kind):
    headers = client.get(path).headers
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert len(headers.getlist("Content-Security-Policy")) == 1
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "Set-Cookie" not in headers


@files
def test_an_etag_is_of_the_content_and_saves_sending_it_again(client, path, name, kind):
    first = client.get(path)
    assert first.headers["Cache-Control"] == "no-cache"
    assert first.headers["ETag"] == f'"{sha256(first.data).hexdigest()}"'
    again = client.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    assert again.headers["ETag"] == first.headers["ETag"]
    assert again.headers["Content-Security-Policy"] == first.headers["Content-Security-Policy"]
    assert client.get(path, headers={"If-None-Match": '"older"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard/",
        "/dashboard/index.html",
        "/dashboard/__init__.py",
        "/dashboard/../app.py",
        "/dashboard/%2e%2e/app.py",
        "/static/page.js",
    ],
)
def test_nothing_but_the_three_files_is_served(client, path):
    assert client.get(path).status_code == 404


@files
def test_it_is_read_only(client, path, name, kind):
    assert {method: client.open(path, method=method).status_code for method in ("POST", "PUT", "DELETE")} == {
        "POST": 405,
        "PUT": 405,
        "DELETE": 405,
    }


# --- what is in it ---------------------------------------------------------------------------------------


def test_the_page_has_no_script_and_no_style_of_its_own(elements):
    assert elements.inline == ""
    for tag, attributes in elements.found:
        assert tag != "style"
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")]


def test_the_page_refers_to_its_own_files_only(elements, client):
    wanted = [
        attributes[name]
        for _, attributes in elements.found
        for name in ("src", "href", "action")
        if name in attributes
    ]
    own = [place for place in wanted if not place.startswith("data:image/")]
    assert own == ["/dashboard/page.css", "/dashboard/page.js", "/signin"]
    assert all(client.get(place).status_code == 200 for place in own if place != "/signin")
    assert "@import" not in STYLE
    assert "url(" not in STYLE


@pytest.mark.parametrize("word", STARTS_MARKUP + STARTS_CODE)
def test_the_script_never_turns_text_into_markup_or_code(word):
    assert word not in SCRIPT


def test_the_script_asks_paths_that_the_api_has_and_only_reads(app):
    paths = re.findall(r"""["'`](/api/v1/[^"'`?]+)""", SCRIPT)
    assert len(set(paths)) == 10
    routes = app.url_map.bind("localhost")
    for path in paths:
        concrete = re.sub(r"\$\{[^}]*\}", "1", path)
        try:
            rule, _ = routes.match(concrete, method="GET", return_rule=True)
        except HTTPException as error:
            pytest.fail(f"{path}: {error}")
        assert str(rule).startswith("/api/v1/")
    assert re.findall(r"fetch\([^,]*, \{ method: .*?\}", SCRIPT) == ['fetch("/signout", { method: "POST" }']
    assert SCRIPT.count("method:") == 1


def test_the_api_takes_the_queries_of_the_lists(sign_in):
    call = sign_in("reader")
    queries = re.findall(r'"/api/v1(/[^"]+)"', SCRIPT)
    assert {query: call("GET", query).status_code for query in queries} == dict.fromkeys(queries, 200)


def test_every_element_that_the_script_looks_for_is_in_the_page(elements):
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    looked_for = set(re.findall(r'\b(?:at|setText|showRows)\("([a-z-]+)"', SCRIPT))
    assert len(looked_for) > 10
    assert looked_for <= set(ids)


def test_the_page_can_be_used_without_seeing_it(elements):
    heads = [attributes for tag, attributes in elements.found if tag == "th"]
    assert heads
    assert all(attributes.get("scope") == "col" for attributes in heads)
    labelled = {attributes["for"] for tag, attributes in elements.found if tag == "label"}
    assert {attributes["id"] for tag, attributes in elements.found if tag == "input"} == labelled
    by_id = {attributes["id"]: attributes for _, attributes in elements.found if "id" in attributes}
    assert by_id["status"]["aria-live"] == "polite"
    named = [
        attributes["aria-labelledby"] for _, attributes in elements.found if "aria-labelledby" in attributes
    ]
    assert named
    assert set(named) <= set(by_id)
    assert ("html", {"lang": "en"}) in elements.found


if shutil.which("node"):  # the rest of this file needs no JavaScript engine

    def test_the_script_parses(tmp_path):
        module = tmp_path / "page.mjs"
        module.write_text(SCRIPT)
        done = subprocess.run(["node", "--check", str(module)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


# --- who sees what ---------------------------------------------------------------------------------------


def test_without_a_token_the_page_loads_and_the_api_refuses(client):
    assert client.get("/").status_code == 200
    for query in set(re.findall(r'"(/api/v1/[^"]+)"', SCRIPT)) - {"/api/v1/signin"}:
        assert client.get(query).status_code == 401


def test_the_token_is_taken_from_the_fragment_and_kept_for_the_tab_alone():
    assert "location.hash" in SCRIPT
    assert "history.replaceState" in SCRIPT
    assert "sessionStorage" in SCRIPT
    for lasting in ("localStorage", "document.cookie", "indexedDB", "location.search.get"):
        assert lasting not in SCRIPT
