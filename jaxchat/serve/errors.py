"""Errors of the API, as OpenAI writes them: {"error": {"message", "type", "param", "code"}}."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from jaxchat.errors import UserError
from jaxchat.tokenizer.sentencepiece import scalar_values

# OpenAI's `type` by status; clients choose their exception by the status alone.
TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "not_found_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    500: "server_error",
    503: "server_error",
}
# Names that pydantic gives to the types that a field may have, as parts of the place of a mistake.
KIND = re.compile(r"str|Tool|constrained-\w+|(list|literal)\[.*")


class ApiError(Exception):
    """An answer of another status than 200. `retry_after`: seconds after which the client should try again."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(scalar_values(message))
        self.status, self.code, self.param = status, code, param and scalar_values(param)
        self.headers: dict[str, str] = {"retry-after": str(retry_after)} if retry_after else {}
        if status == 401:
            self.headers["www-authenticate"] = 'Basic realm="the API key is the password"'

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=30)


def as_api_error(error: BaseException) -> ApiError:
    """An API error as it is, a user's mistake with status 400, a body that is not JSON with 400, one that is not what
    the API takes with 422, anything else with 500 and without its text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, RequestValidationError | ValidationError):
        return _first_mistake(error.errors())
    if isinstance(error, HTTPException):
        found = ApiError(error.status_code, str(error.detail))
        found.headers |= error.headers or {}
        return found
    return ApiError(500, "the server failed to answer this request; its log has the reason", code="internal_error")


def _first_mistake(mistakes: Sequence[Any]) -> ApiError:
    """A mistake of a body in one sentence, without the value, which may be long or not printable. A field of several
    types has mistakes for each; what is wrong with the type that was meant says more than that it is not another."""
    other_type = ("_type", "literal_error")
    mistake = next((one for one in mistakes if not one["type"].endswith(other_type)), mistakes[0])
    if mistake["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON")
    if isinstance(mistake["input"], bytes):
        return ApiError(422, "the body was not sent as JSON: set the header Content-Type: application/json")
    first, *rest = [part for i, part in enumerate(mistake["loc"]) if i or part != "body"] or [""]
    place = ".".join(str(part) for part in (first, *rest) if part is first or not KIND.fullmatch(str(part)))
    return ApiError(422, f"{place or 'the body'}: {mistake['msg']}", param=place or None)
