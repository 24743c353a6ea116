"""Errors of the HTTP service in OpenAI's words: status and body; what happened inside goes to the log."""

from __future__ import annotations

import logging

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from domains.errors import ContextOverflow, ModelError
from serve.guard import error_body

_log = logging.getLogger("preceptor.serve")


class Refused(Exception):
    """A request that is not taken, with its HTTP status and OpenAI's code for it."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


async def on_error(_request: Request, error: Exception) -> Response:
    """The answer to a request that failed."""
    status, body = explain(error)
    return Response(body, status_code=status, media_type="application/json")


def explain(error: Exception) -> tuple[int, bytes]:
    """Status and body for an error. What happened inside (paths!) goes to the log, not to the client."""
    if isinstance(error, Refused):
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        return error.status, error_body(str(error), code=error.code, param=error.param, kind=kind)
    if isinstance(error, ContextOverflow):
        message = f"{error.what}; expected {error.expected}. Nothing was cut."
        return 400, error_body(message, code="context_length_exceeded", param="messages")
    if isinstance(error, RequestValidationError):
        return 400, _explain_request(error)
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return error.status_code, error_body(str(error.detail), code=code)
    _log.error("request failed: %s", error, exc_info=error)
    status = 503 if isinstance(error, ModelError) else 500
    message = f"the assistant can't answer ({type(error).__name__}); the server's log says why"
    return status, error_body(message, code="internal_error", kind="server_error")


def _explain_request(error: RequestValidationError) -> bytes:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    param = where[0] if where else None
    if first["type"] == "extra_forbidden":
        return error_body(f"unknown field {'.'.join(where)!r}", code="unknown_parameter", param=param)
    if first["type"] == "json_invalid":
        return error_body("the body is not valid JSON", code="invalid_json")
    message = f"{'.'.join(where) or 'the body'}: {first['msg']}"
    return error_body(message, code="unsupported_value", param=param)
