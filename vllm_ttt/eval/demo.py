"""`vllm-ttt demo`: a server, the comparison with the frozen model and with retrieval, one table and one plot."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from rich.console import Console

from vllm_ttt.errors import ConfigError
from vllm_ttt.eval import plots, protocols, real, report, runner, server, texts
from vllm_ttt.eval.client import Client

#: The demo's model and texts: in the repository, not in the wheel.
FOLDER = Path(__file__).resolve().parents[2] / "demo"

#: Eager: compiling takes a minute or more, and the whole run not much longer.
SERVER = ["--plugin", "ttt", "--max-model-len", "2048", "--kv-cache-memory-bytes", str(2**30), "--enforce-eager"]

#: interactions of P2 and passes of P3
COUNTS = {"p2": 6, "p3": 4}
QUICK = {"p2": 3, "p3": 2}
ARMS = ("frozen", "retrieval", "ttt")


def demo(
    model: Path | None, out: Path, port: int | None, keep: bool, quick: bool, console: Console, on_real: bool = False
) -> None:
    """Run the demo; nothing that it started outlives it, unless ``keep``.

    Args:
        model: folder of the model to serve; None: the repository's ``demo/model``.
        out: folder for server.log, demo.png and demo.json.
        port: of the server, on 127.0.0.1; None: a free one.
        keep: leave the server running.
        quick: fewer interactions, two domains.
        on_real: with the real model and its texts, and with n-grams beside.
    Raises:
        ConfigError: the model or the texts are missing.
        StartError: the server did not start.
        ServerError: it does not answer as it should.
    """
    if on_real and not (real.MODEL.is_dir() and real.TEXTS.is_dir()):
        raise ConfigError(f"there is no {real.MODEL}, or no {real.TEXTS}: `make demo REAL=1` in a checkout fetches them first")
    name = model.resolve().name if model else real.MODEL.name if on_real else "ttt-demo-15m"
    model = _existing(model or (real.MODEL if on_real else FOLDER / "model"))
    found = texts.read_texts(real.TEXTS if on_real else FOLDER / "texts")
    if quick and not on_real:
        found = {domain: found[domain] for domain in ("kjv", "man_fr")}
    port, log, began = port or server.free_port(), out / "server.log", time.monotonic()
    flags = [*SERVER, "--served-model-name", name]
    if _slow_in_16_bits():
        console.print("this CPU has no fast products in 16 bits: the model is served in float32")
        flags += ["--dtype", "float32"]
    with server.serve([str(model), *flags], port, log, keep) as process:
        with console.status(f"starting vLLM (half a minute or more; log: {log})"):
            server.wait_healthy(process, port, log)
        console.print(f"serving {name} on http://127.0.0.1:{port} after {time.monotonic() - began:.0f} s")
        console.print(f"watch it learn: http://127.0.0.1:{port}/ttt", soft_wrap=True)
        arms = (*ARMS, "ngrams", "ttt_ngrams") if on_real else ARMS
        results = asyncio.run(_compare(f"http://127.0.0.1:{port}", found, QUICK if quick else COUNTS, arms, console))
        console.print(report.table(results))
        command = "vllm-ttt demo" + " --real" * on_real + " --quick" * quick
        runner.write_json(out / "demo.json", results, {"command": command, "model": name})
        title = f"{name}: one TTT session in each of {len(found)} domains, mean"
        plots.plot(results, out / "demo.png", title)
        console.print(f"plot: {out / 'demo.png'}\nfigures: {out / 'demo.json'}", soft_wrap=True)
        console.print(f"{time.monotonic() - began:.0f} s in all")
        if keep:
            console.print(f"the server keeps running (stop it with: kill {process.pid})")
            console.print(f"the page says how to make a session learn: http://127.0.0.1:{port}/ttt", soft_wrap=True)


def _slow_in_16_bits() -> bool:
    import torch

    from vllm_ttt.worker.step.tail import step_dtype

    return not torch.cuda.is_available() and step_dtype(torch.bfloat16, torch.device("cpu")) == torch.float32


async def _compare(
    url: str, found: dict[str, list[str]], counts: dict[str, int], arms: tuple[str, ...], console: Console
) -> dict[str, protocols.Result]:
    async with Client(url) as client:
        docs = await texts.encode(found, client.tokenize)
        return await runner.run(client, docs, counts, 1, console, arms)


def _existing(model: Path) -> Path:
    if (model / "config.json").is_file():
        return model
    raise ConfigError(
        f"there is no model at {model}. The demo's model is part of the repository, not of the installed package: "
        "run `make demo` in a checkout, or give the folder of another model with --model"
    )
