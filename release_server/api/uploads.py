"""Resumable uploads of bundles and indexes, addressed by the sha256 of the whole."""

from __future__ import annotations

from flask import Response, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, Field

from agent_core.errors import MalformedError, NotFoundError
from agent_core.wire import SHA256
from release_server.api import PREFIX, problems, services
from release_server.api.access import requires
from release_server.api.people import SECURITY
from release_server.blobs import UploadConflictError

OFFSET = "Upload-Offset"
LENGTH = "Upload-Length"
COMPLETE = "Upload-Complete"

blueprint = APIBlueprint(
    "uploads", __name__, url_prefix=PREFIX, abp_tags=[Tag(name="uploads")], abp_security=SECURITY
)


class UploadPath(BaseModel):
    sha256: str = Field(pattern=f"^{SHA256.pattern}$")


@blueprint.errorhandler(UploadConflictError)
def answer_conflict(error: UploadConflictError) -> Response:
    response = problems.answer_error(error)
    response.headers[OFFSET] = str(error.offset)
    return response


@blueprint.route("/uploads/<sha256>", methods=["HEAD"])
@requires("releaser")
def show_upload(path: UploadPath) -> Response:
    """How much of a blob has arrived."""
    blobs = services().blobs
    length = blobs.length(path.sha256)
    if length is not None:
        return Response(headers={OFFSET: str(length), COMPLETE: "1"})
    offset = blobs.upload_offset(path.sha256)
    if offset is None:
        raise NotFoundError("nothing of it has arrived")
    return Response(headers={OFFSET: str(offset)})


@blueprint.patch("/uploads/<sha256>")
@requires("releaser")
def append_upload(path: UploadPath) -> Response:
    """Add the next piece; needs the headers `Upload-Offset` and `Upload-Length`."""
    hub = services()
    limit = hub.config.upload_limit
    offset, total = _number(OFFSET), _number(LENGTH)
    if total > limit:
        raise problems.too_large(limit)
    request.max_content_length = limit
    arrived = hub.blobs.append(path.sha256, offset, total, request.stream)
    headers = {OFFSET: str(arrived)} | ({COMPLETE: "1"} if arrived == total else {})
    return Response(status=204, headers=headers)


def _number(header: str) -> int:
    text = request.headers.get(header, "")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise MalformedError(f"the header {header} is missing or no number", why=repr(text[:40]))
    return int(text)
