"""Test-time training for vLLM: sessions whose low-rank delta is learned between the engine's iterations.

Imports nothing heavy: vLLM loads this package in each of its processes, also when no session is ever used.
"""

from vllm_ttt.plugin import engine_args

__all__ = ["engine_args"]
__version__ = "0.1.0"
