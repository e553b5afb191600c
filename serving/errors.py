"""The errors that a caller of a served model can get: one sentence, an HTTP status and a machine-readable code."""


class ServingError(ValueError):
    """A request that cannot be answered, and why; it crosses process borders by value.

    Args:
        status: HTTP status of the answer.
        message: one sentence: what is wrong, where, what to do.
        code: stable identifier such as `model_not_found`.
        param: the request's field that is at fault, where there is one.
        retry_after_s: after how many seconds the same request may succeed.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(status, message, code, param, retry_after_s)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


def bad_request(message: str, param: str | None = None, code: str = "invalid_request") -> ServingError:
    """A request that is wrong in itself: status 400."""
    return ServingError(400, message, code, param)


def deadline_passed(timeout_s: float) -> ServingError:
    """The answer was not there in time: status 504."""
    message = f"no answer within {timeout_s:g} s; try again, or send less at once"
    return ServingError(504, message, "deadline_exceeded", retry_after_s=1.0)
