"""The errors that users meet. Each says what was given, what is allowed and what to do; all survive pickling."""


class TTTError(Exception):
    """Base of every error that vllm-ttt raises on purpose."""


class ConfigError(TTTError, ValueError):
    """The configuration, or its combination with the model or with vLLM's options, cannot be served."""


class PatchContractError(TTTError, RuntimeError):
    """A vLLM function that we wrap is not the one that this release of vllm-ttt was written for."""


#: Seconds after which whoever met a session on its way from one server to another may ask again.
AGAIN = 2


class RequestError(TTTError, ValueError):
    """A client's request is not acceptable.

    Args:
        message: what is wrong and what is allowed.
        status: the HTTP status to answer with, 4xx.
        param: the field that is wrong, as the client knows it.
        retry_after: seconds after which the same request may succeed; the answer says so.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, retry_after: int | None = None):
        super().__init__(message, status, param, retry_after)
        self.message, self.status, self.param, self.retry_after = message, status, param, retry_after

    def __str__(self) -> str:
        return self.message
