from __future__ import annotations

from hashlib import sha256

import pytest

from agent_core.wire import bundle_path

CONTENT = b"bundle " * 1000
DIGEST = sha256(CONTENT).hexdigest()


@pytest.fixture
def releaser(sign_in):
    return sign_in("releaser", name="ada")


@pytest.fixture
def push(releaser, trusted):
    def send(metadata):
        return releaser("POST", "/metadata/targets", data=trusted.sign(metadata))

    return send


def test_a_release_that_was_pushed_is_listed_with_its_facts(push, trusted, blobs, releaser, sign_in):
    metadata = trusted.targets()
    trusted.add(metadata, blobs, "1.0", 10, notes="first")
    trusted.add(metadata, blobs, "1.1", 11, gates=("canary",))
    answer = push(metadata)
    assert (answer.status_code, answer.json) == (202, {"version": 1})
    items = sign_in("reader")("GET", "/releases?product=demo").json["items"]
    assert [(item["version"], item["seq"]) for item in items] == [("1.1", 11), ("1.0", 10)]
    shown = releaser("GET", "/releases/demo/1.0").json
    assert (shown["notes"], shown["published_by"], shown["bundles"][0]["platform"]) == ("first", "ada", "any")
    digest = metadata.signed.targets[bundle_path("demo", "1.0", "any")].hashes["sha256"]
    assert shown["bundles"][0]["sha256"] == digest
    assert [item["name"] for item in releaser("GET", "/products").json["items"]] == ["demo"]


@pytest.mark.parametrize("path", ["/releases/demo/1.0", "/releases?product=demo"])
def test_an_unknown_product_is_404(releaser, path):
    assert releaser("GET", path).status_code == 404


def test_an_unknown_version_is_404(releaser):
    releaser("POST", "/products", json={"name": "demo"})
    assert releaser("GET", "/releases/demo/1.0").status_code == 404


def test_a_product_is_made_once(releaser):
    assert releaser("POST", "/products", json={"name": "demo"}).status_code == 201
    assert releaser("POST", "/products", json={"name": "demo"}).status_code == 409


def test_the_second_of_two_pushes_is_told_of_the_conflict(push, trusted, blobs):
    first, second = trusted.targets(), trusted.targets()
    trusted.add(first, blobs, "1.0", 10)
    trusted.add(second, blobs, "1.1", 10)
    assert push(first).status_code == 202
    answer = push(second)
    assert (answer.status_code, answer.json["reason"]) == (409, "old-base")


def test_targets_that_cannot_be_verified_are_422_with_the_reason(push, trusted, releaser):
    trusted.release_keys = [trusted.root_key]
    answer = push(trusted.targets())
    assert (answer.status_code, answer.json["reason"]) == (422, "bad-signature")


def test_the_newest_targets_are_there_before_they_are_published(push, trusted, releaser):
    assert releaser("GET", "/metadata/targets").status_code == 404
    body = trusted.sign(trusted.targets())
    releaser("POST", "/metadata/targets", data=body)
    assert releaser("GET", "/metadata/targets").data == body


def test_signed_metadata_has_a_limit_of_its_own(releaser, config):
    answer = releaser("POST", "/metadata/targets", data=b"x" * (config.metadata_limit + 1))
    assert answer.status_code == 413


@pytest.mark.parametrize("role", ["reader", "operator", "enroller"])
def test_only_releasers_push_and_upload(sign_in, role):
    call = sign_in(role)
    assert call("POST", "/metadata/targets", data=b"{}").status_code == 403
    assert call("PATCH", f"/uploads/{DIGEST}", data=b"x").status_code == 403


# --- trust -----------------------------------------------------------------------------------------------


def test_trust_shows_what_a_ceremony_needs(sign_in, online):
    answer = sign_in("reader")("GET", "/trust")
    told = {"online": online.to_json(), "upcoming": None, "root_version": 0, "targets_version": 0}
    assert answer.json == told


def test_an_admin_puts_the_root_and_nobody_else(sign_in, managers):
    body = managers.root().to_bytes()
    assert sign_in("releaser")("PUT", "/trust/root", data=body).status_code == 403
    admin = sign_in("admin")
    assert admin("PUT", "/trust/root", data=body).json == {"version": 1}
    assert admin("PUT", "/trust/root", data=body).status_code == 409
    assert admin("GET", "/trust").json["root_version"] == 1


def test_a_root_without_signatures_is_422(sign_in, managers):
    metadata = managers.root()
    metadata.signatures.clear()
    answer = sign_in("admin")("PUT", "/trust/root", data=metadata.to_bytes())
    assert (answer.status_code, answer.json["reason"]) == (422, "bad-signature")


# --- uploads ---------------------------------------------------------------------------------------------


@pytest.fixture
def patch(releaser):
    def send(piece, offset, total=None, digest=DIGEST):
        length = len(CONTENT) if total is None else total
        headers = {"Upload-Offset": str(offset), "Upload-Length": str(length)}
        return releaser("PATCH", f"/uploads/{digest}", data=piece, headers=headers)

    return send


def test_an_upload_goes_on_where_it_stopped(patch, releaser, blobs):
    assert releaser("HEAD", f"/uploads/{DIGEST}").status_code == 404
    answer = patch(CONTENT[:1000], 0)
    assert (answer.status_code, answer.headers["Upload-Offset"]) == (204, "1000")
    answer = releaser("HEAD", f"/uploads/{DIGEST}")
    assert (answer.status_code, answer.headers["Upload-Offset"]) == (200, "1000")
    assert "Upload-Complete" not in answer.headers
    assert patch(CONTENT[1000:], 1000).headers["Upload-Complete"] == "1"
    answer = releaser("HEAD", f"/uploads/{DIGEST}")
    assert (answer.headers["Upload-Offset"], answer.headers["Upload-Complete"]) == (str(len(CONTENT)), "1")
    assert blobs.path(DIGEST).read_bytes() == CONTENT


def test_a_wrong_offset_is_409_and_says_the_right_one(patch):
    patch(CONTENT[:1000], 0)
    answer = patch(CONTENT[:1000], 0)
    assert (answer.status_code, answer.headers["Upload-Offset"]) == (409, "1000")


def test_an_upload_that_is_not_its_name_is_422_and_dropped(patch, releaser):
    answer = patch(CONTENT[:-1] + b"!", 0)
    assert (answer.status_code, answer.json["reason"]) == (422, "digest-mismatch")
    assert releaser("HEAD", f"/uploads/{DIGEST}").status_code == 404


@pytest.mark.parametrize(
    "headers",
    [{}, {"Upload-Offset": "0"}, {"Upload-Offset": "-1", "Upload-Length": "1"}, {"Upload-Offset": "٣"}],
)
def test_an_upload_without_its_numbers_is_400(releaser, headers):
    encoded = {name: value.encode().decode("latin-1") for name, value in headers.items()}
    assert releaser("PATCH", f"/uploads/{DIGEST}", data=b"x", headers=encoded).status_code == 400


def test_an_upload_over_the_limit_is_413(patch, config):
    assert patch(b"x", 0, total=config.upload_limit + 1).status_code == 413


def test_a_name_that_is_no_sha256_is_422(patch):
    assert patch(b"x", 0, digest="abc").status_code == 422
