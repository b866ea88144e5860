"""Why something is not done, in OpenAI's form of an error."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from antiphon.errors import AntiphonError, BusyError

INTERNAL = "something went wrong in the server; its log names this request"


class Refused(Exception):
    """A request that is not served: an HTTP status and OpenAI's four fields."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param, self.retry_after = message, status, code, param, retry_after

    @property
    def kind(self) -> str:
        """OpenAI's type of the error."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as a response."""
        headers = {} if self.retry_after is None else {"retry-after": f"{self.retry_after:.0f}"}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def refusal(error: Exception) -> Refused:
    """What to tell of an error; of one that nobody foresaw, nothing of what is inside."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, BusyError):
        return Refused(str(error), 503, "server_overloaded", retry_after=error.retry_after)
    if isinstance(error, AntiphonError):
        return Refused(str(error), code="invalid_value")
    return Refused(INTERNAL, 500, "internal_error")
