"""Loggers, and what is logged rarely."""

from __future__ import annotations

import logging

from vllm.logger import init_logger


def logger_of(module: str) -> logging.Logger:
    """``module`` is the ``__name__`` of one of ours: vLLM configures the loggers below its own."""
    return init_logger(f"vllm.{module}")


class Rarely:
    """Counts how often something has happened; of that the first ten and every thousandth are to be logged."""

    def __init__(self) -> None:
        self.count = 0

    def again(self) -> bool:
        """It has happened again; whether that is to be logged."""
        self.count += 1
        return self.count <= 10 or self.count % 1000 == 0
