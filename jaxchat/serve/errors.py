"""Errors of the API, as OpenAI writes them: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

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


class ApiError(Exception):
    """An answer of another status than 200. `retry_after`: seconds after which the client should try again."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, scalar_values(message), code
        self.param = None if param is None else scalar_values(param)
        self.headers = {"retry-after": str(retry_after)} if retry_after else {}
        if status == 401:
            self.headers["www-authenticate"] = 'Basic realm="the API key is the password"'

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=30)


def as_api_error(error: BaseException) -> ApiError:
    """An API error as it is, a user's mistake with status 400, anything else with 500 and without its text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    return ApiError(500, "the server failed to answer this request; its log has the reason", code="internal_error")
