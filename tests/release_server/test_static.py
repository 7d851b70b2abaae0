from __future__ import annotations

from hashlib import sha256

import pytest

from release_server.blobs import write_file
from release_server.static import StaticFiles

BODY = bytes(range(256)) * 100
DIGEST = sha256(BODY).hexdigest()
TARGET = f"/targets/bundles/demo/1.0+x/{DIGEST}.linux-x86_64.tar.zst"
STAMP = b'{"timestamp": 1}'


@pytest.fixture
def repository(tmp_path):
    directory = tmp_path / "repository"
    write_file(directory / "metadata" / "1.root.json", b'{"root": 1}')
    write_file(directory / "metadata" / "3.snapshot.json", b'{"snapshot": 3}')
    write_file(directory / "metadata" / "timestamp.json", STAMP)
    write_file(directory / TARGET[1:], BODY)
    write_file(tmp_path / "secret.json", b"secret")
    return directory


@pytest.fixture
def get(repository):
    def behind(environ, start):
        start("200 OK", [("X-Behind", "yes")])
        return [b"behind"]

    static = StaticFiles(behind, repository)

    def call(path, method="GET", **headers):
        environ = {"REQUEST_METHOD": method, "PATH_INFO": path}
        environ |= {f"HTTP_{name.upper()}": value for name, value in headers.items()}
        seen = []
        answer = static(environ, lambda status, fields: seen.append((int(status[:3]), dict(fields))))
        body = b"".join(answer)
        if hasattr(answer, "close"):
            answer.close()
        return *seen[0], body

    return call


def test_everything_else_goes_on_to_the_application(get):
    assert get("/api/v1/whoami")[2] == b"behind"


def test_the_etag_of_the_timestamp_names_the_newest_root_and_the_content(get, repository):
    status, headers, body = get("/metadata/timestamp.json")
    assert (status, body) == (200, STAMP)
    assert headers["ETag"] == f'"1-{sha256(STAMP).hexdigest()}"'
    assert headers["Cache-Control"] == "no-cache"
    write_file(repository / "metadata" / "2.root.json", b"{}")
    assert get("/metadata/timestamp.json")[1]["ETag"] == f'"2-{sha256(STAMP).hexdigest()}"'


def test_an_idle_poll_is_answered_304_without_a_body(get):
    etag = get("/metadata/timestamp.json")[1]["ETag"]
    status, headers, body = get("/metadata/timestamp.json", if_none_match=etag)
    assert (status, body, headers["ETag"]) == (304, b"", etag)


def test_a_new_root_alone_ends_the_304(get, repository):
    etag = get("/metadata/timestamp.json")[1]["ETag"]
    write_file(repository / "metadata" / "2.root.json", b"{}")
    assert get("/metadata/timestamp.json", if_none_match=etag)[0] == 200


def test_a_replaced_timestamp_is_seen_at_once(get, repository):
    etag = get("/metadata/timestamp.json")[1]["ETag"]
    write_file(repository / "metadata" / "timestamp.json", b'{"timestamp": 2}')
    status, _, body = get("/metadata/timestamp.json", if_none_match=etag)
    assert (status, body) == (200, b'{"timestamp": 2}')


@pytest.mark.parametrize("condition", ["*", "W/{etag}", '"other", {etag}'])
def test_conditions_are_compared_weakly_and_may_be_lists(get, condition):
    etag = get(TARGET)[1]["ETag"]
    assert get(TARGET, if_none_match=condition.format(etag=etag))[0] == 304


@pytest.mark.parametrize("path", ["/metadata/3.snapshot.json", TARGET])
def test_versioned_and_hashed_names_never_change(get, path):
    assert "immutable" in get(path)[1]["Cache-Control"]


def test_a_whole_target_is_sent_with_its_length(get):
    status, headers, body = get(TARGET)
    assert (status, body, headers["Content-Length"]) == (200, BODY, str(len(BODY)))
    assert headers["Accept-Ranges"] == "bytes"


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=100-199", 100, 199),
        ("bytes=25000-", 25_000, 25_599),
        ("bytes=-10", 25_590, 25_599),
        ("bytes=-99999", 0, 25_599),
        ("bytes=25599-99999", 25_599, 25_599),
    ],
)
def test_a_range_is_sent_as_206(get, asked, first, last):
    status, headers, body = get(TARGET, range=asked)
    assert status == 206
    assert headers["Content-Range"] == f"bytes {first}-{last}/25600"
    assert body == BODY[first : last + 1]
    assert headers["Content-Length"] == str(len(body))


@pytest.mark.parametrize("asked", ["bytes=25600-", "bytes=99999-100000", "bytes=-0"])
def test_a_range_out_of_reach_is_416_and_says_the_length(get, asked):
    status, headers, _ = get(TARGET, range=asked)
    assert (status, headers["Content-Range"]) == (416, "bytes */25600")


@pytest.mark.parametrize(
    "asked", ["bytes=5-1", "bytes=-", "bytes=0-1,5-6", "lines=0-1", "bytes=a-b", "bytes=1"]
)
def test_a_range_that_is_none_is_ignored(get, asked):
    assert get(TARGET, range=asked)[0] == 200


def test_a_resume_of_something_else_starts_anew(get):
    etag = get(TARGET)[1]["ETag"]
    assert get(TARGET, range="bytes=5-", if_range=etag)[0] == 206
    assert get(TARGET, range="bytes=5-", if_range='"other"')[0] == 200
    assert get(TARGET, range="bytes=5-", if_range=f"W/{etag}")[0] == 200


@pytest.mark.parametrize("path", [TARGET, "/metadata/timestamp.json", "/metadata/none.json"])
def test_head_has_the_headers_of_get_and_no_body(get, path):
    status, headers, _ = get(path)
    assert get(path, "HEAD") == (status, headers, b"")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_nothing_is_written_here(get, method):
    status, headers, _ = get(TARGET, method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "path",
    [
        "/metadata/",
        "/metadata/none.json",
        "/metadata/../../secret.json",
        "/metadata/..",
        "/metadata/.lock",
        "/metadata/a/b.json",
        "/metadata/x\0.json",
        "/metadata/timestamp.json/",
        "/targets/",
        "/targets/bundles",
        "/targets/../metadata/timestamp.json",
        "/targets/bundles/../../../secret.json",
        f"/targets/bundles//{DIGEST}.x",
        f"/targets/{DIGEST}.none",
        f"/targets/bundles/demo/.hidden/{DIGEST}.x",
        f"{TARGET}/{DIGEST}.x",
    ],
)
def test_no_path_leads_out_of_the_repository(get, path):
    status, headers, body = get(path)
    assert status == 404
    assert headers["Content-Type"] == "application/problem+json"
    assert b"secret" not in body


def test_a_cached_file_that_was_removed_is_gone(get, repository):
    assert get("/metadata/3.snapshot.json")[0] == 200
    (repository / "metadata" / "3.snapshot.json").unlink()
    assert get("/metadata/3.snapshot.json")[0] == 404


def test_the_memory_of_metadata_is_bounded(repository, monkeypatch):
    monkeypatch.setattr("release_server.static.CACHED_BYTES", 100)
    static = StaticFiles(lambda environ, start: [], repository)
    for version in range(20):
        write_file(repository / "metadata" / f"{version}.targets.json", b"x" * 30)
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": f"/metadata/{version}.targets.json"}
        static(environ, lambda status, headers: None)
    assert len(static._cache) == 3
    assert static._cached_bytes == 90
