"""Answers that are no verdict."""


class ServiceError(Exception):
    """What an HTTP client gets in place of a verdict. Its message holds nothing of a request's text.

    Attributes:
        status: of HTTP.
        code: for programs, and the `reason` of metrics.
        retry_after: seconds after which the same request would be taken; None if never.
    """

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after
