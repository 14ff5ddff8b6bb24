"""vllm.entrypoints.serve.exception_handling.register.validation_exception_handler: say what ids and knobs may be.

Pydantic refuses what has the wrong type before we see it, with a message that names types but not rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_ttt.errors import RequestError
from vllm_ttt.frontend import refusals
from vllm_ttt.patches import _contract
from vllm_ttt.types import Knobs, check_session_id

_PARAMETERS = {"validation_exception_handler": "req exc"}


def install() -> None:
    from vllm.entrypoints.serve.exception_handling import register

    name = "validation_exception_handler"
    _contract.wrap(register, name, _PARAMETERS[name], _validation_exception_handler)


def check() -> None:
    from vllm.entrypoints.serve.exception_handling import register

    for name, parameters in _PARAMETERS.items():
        _contract.check(register, name, parameters)


def _validation_exception_handler(original: Callable) -> Callable:
    async def validation_exception_handler(req: Any, exc: Any) -> Any:
        from starlette.responses import JSONResponse

        try:
            for problem in exc.errors():
                if isinstance(problem, dict):  # of a wrong content type vLLM says a text
                    _explain(problem)
        except RequestError as error:
            return JSONResponse(refusals.to_openai(error), status_code=error.status)
        return await original(req, exc)

    return validation_exception_handler


def _explain(problem: dict[str, Any]) -> None:
    """Raise RequestError where a pydantic error is about a session id or a ``ttt_*`` knob.

    Args:
        problem: an item of ``errors()``; its ``loc`` is such as ("body", "vllm_xargs", "ttt_learn", "int"), where the
            last says which type was tried.
    """
    place = [str(part) for part in problem.get("loc", ())]
    if "vllm_xargs" in place[:-1]:
        key = place[place.index("vllm_xargs") + 1]
        if key == "session_id":
            check_session_id(problem.get("input"), "vllm_xargs.session_id")
        elif key.startswith("ttt_"):
            # What a list holds is reported item by item: the input is then not the value.
            value = problem.get("input") if len(place) <= place.index("vllm_xargs") + 3 else [problem.get("input")]
            Knobs.parse({key: value})
    elif place[-1:] == ["session_id"]:
        check_session_id(problem.get("input"))
