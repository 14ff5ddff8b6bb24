"""`vllm-ttt demo`: a server that learns, sessions that read this project beside whatever else remembers, a plot, a question."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vllm_ttt.errors import ConfigError
from vllm_ttt.eval import plots, protocols, real, rounds, runner, server
from vllm_ttt.eval.board import Board, later, progress, verdict
from vllm_ttt.eval.client import Client

ROOT = Path(__file__).resolve().parents[2]

#: Eager: compiling takes a minute or more, and the whole run not much longer.
SERVER = ["--plugin", "ttt", "--kv-cache-memory-bytes", str(2**30), "--enforce-eager"]
#: Tokens of a request: the last documents before another one fit it.
CONTEXT = 4096

#: Documents that a session reads, and sessions.
ROUNDS, SESSIONS = 6, 3
QUICK = (3, 2)


def demo(model: str | None, out: Path, port: int | None, keep: bool, quick: bool, console: Console) -> None:
    """Run the demo; nothing that it started outlives it, unless ``keep``. Interrupted, it leaves no file either.

    Args:
        model: folder, or name on a hub, of the model to serve; None: the real model of `make real`.
        out: folder for server.log, demo.png and demo.json.
        port: of the server, on 127.0.0.1; None: a free one.
        keep: leave the server running.
        quick: fewer documents, fewer sessions.
    Raises:
        ConfigError: the model or the texts are missing.
        StartError: the server did not start.
        ServerError: it does not answer as it should.
    """
    folder = _folder(model)
    rounds.files(ROOT)
    name = folder.name if folder else str(model)
    flags = [*SERVER, "--served-model-name", name, "--max-model-len", str(min(CONTEXT, _context(str(folder or model))))]
    if dtype := server.dtype_flags():
        slow = "this CPU has no fast products in 16 bits: the model is served in float32"
        console.print(f"{slow}, and `make demo` takes about twelve minutes on two cores, not four", soft_wrap=True)
        flags += dtype
    port, log, began = port or server.free_port(), out / "server.log", time.monotonic()
    with _no_files_if_interrupted(out), _scratch(keep) as scratch:
        # A model of a hub is fetched there.
        environment = {"TMPDIR": scratch} | ({} if folder else {"HF_HUB_OFFLINE": "0"})
        with server.serve([str(folder or model), *flags], port, log, keep, environment) as process:
            columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
            with Progress(*columns, console=console) as waiting:
                waiting.add_task(f"starting vLLM (half a minute or more; log: {log})")
                server.wait_healthy(process, port, log)
            console.print(f"serving {name} on http://127.0.0.1:{port} after {time.monotonic() - began:.0f} s", soft_wrap=True)
            console.print(f"[bold]watch it learn: http://127.0.0.1:{port}/ttt[/]", soft_wrap=True)
            about = {"command": "vllm-ttt demo" + (f" --model {model}" if model else "") + " --quick" * quick, "model": name}
            asyncio.run(_show(f"http://127.0.0.1:{port}", QUICK if quick else (ROUNDS, SESSIONS), out, about, console))
            console.print(f"{time.monotonic() - began:.0f} s in all")
            if keep:
                console.print(f"the server keeps running (stop it with: kill {process.pid})")
                console.print(f"its sessions are at http://127.0.0.1:{port}/ttt", soft_wrap=True)


async def _show(url: str, counts: tuple[int, int], out: Path, about: dict[str, Any], console: Console) -> None:
    async with Client(url) as client:
        work = await rounds.library(ROOT, client.tokenize, *counts)
        console.print(f"{counts[1]} sessions read {counts[0]} documents each: {', '.join(work.domains)}", soft_wrap=True)
        console.print("beside them: the frozen model; BM25 over what was read; the last documents as context", soft_wrap=True)
        result = await _compare(client, work, console)
        for line in verdict(result):
            console.print(line, soft_wrap=True)
        answers = await _question(client, console)
    about |= {"files": work.files, "later": later(result), "question": rounds.QUESTION, "answers": asdict(answers)}
    runner.write_json(out / "demo.json", {"p2": result}, about)
    plots.plot_rounds(result, out / "demo.png", f"{about['model']}: mean of {len(work.domains)} sessions")
    console.print(f"plot: {out / 'demo.png'}\nfigures: {out / 'demo.json'}", soft_wrap=True)


async def _compare(client: Client, work: rounds.Library, console: Console) -> protocols.Result:
    bar = progress(console)
    task = bar.add_task("documents read", total=rounds.requests(work))
    board = Board(len(work.windows[0]), len(work.domains), bar)

    def saw(arm: str, _: int, measures: Any) -> None:
        board.saw(arm, measures)
        bar.advance(task)
        if not console.is_terminal and board.row_is_whole():  # nothing of what moves is seen there
            console.print(f"document {len(board.cells['ttt']) // board.sessions} of {board.rounds} read")

    with Live(board, console=console, refresh_per_second=4):
        result = await rounds.compare(client, work, saw)
    if not console.is_terminal:
        console.print()
    return result


async def _question(client: Client, console: Console) -> rounds.Answers:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    with progress(console) as bar:
        task = bar.add_task("a fourth session reads the README's first page", total=rounds.READINGS + 2)
        answers = await rounds.question(client, text, lambda: bar.advance(task))
    losses = ", ".join(f"{loss:.2f}" for loss in answers.losses)
    console.print(f"the page is read {rounds.READINGS} times; nats per token each time: {losses}", soft_wrap=True)
    if None not in answers.asked:
        console.print(f"[bold]{rounds.QUESTION}[/]")
        for when, said in zip(("before", "after"), answers.asked, strict=True):
            console.print(f"  {when}: {escape(_line(str(said)))}", highlight=False, soft_wrap=True)
    console.print(f"[bold]How does the page go on after “{escape(_line(answers.beginning))}”?[/]", soft_wrap=True)
    for when, said in zip(("before", "after"), answers.went_on, strict=True):
        count = rounds.agree(said, answers.truth)
        right = f"{count} character{'s' * (count != 1)} right"
        console.print(f"  {when}, {right}: {escape(_line(said))}", highlight=False, soft_wrap=True)
    return answers


def _line(text: str) -> str:
    return " ".join(text.split())


@contextlib.contextmanager
def _no_files_if_interrupted(out: Path) -> Iterator[None]:
    """After Ctrl-C, or a signal that ends the process, ``out`` is as it was, but for what an earlier run has left there."""
    there = out.is_dir()
    try:
        yield
    except (KeyboardInterrupt, SystemExit, asyncio.CancelledError):
        for name in ("server.log", "demo.json", "demo.png"):
            (out / name).unlink(missing_ok=True)
        if not there:
            shutil.rmtree(out, ignore_errors=True)
        raise


@contextlib.contextmanager
def _scratch(keep: bool) -> Iterator[str]:
    """A folder for temporary files of the server, whose processes leave them where they are killed; with ``keep``, it stays."""
    folder = tempfile.mkdtemp(prefix="ttt-")  # short, as names of sockets have to be
    done = False
    try:
        yield folder
        done = True
    finally:
        if not (keep and done):
            shutil.rmtree(folder, ignore_errors=True)


def _context(model: str) -> int:
    """Tokens that the model's own configuration allows. Raises ConfigError: there is no such model."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the model {model} cannot be read: {error}") from error
    return getattr(config, "max_position_embeddings", CONTEXT)


def _folder(model: str | None) -> Path | None:
    """The model's folder; None: it is a name on a hub. Raises ConfigError where there is none."""
    if model is None:
        if real.MODEL.is_dir():
            return real.MODEL
        raise ConfigError(
            f"there is no {real.MODEL}: `make demo` in a checkout fetches it first. The demo's models are part of no installed "
            "package. Or say another one with --model: a folder, or a name on a hub"
        )
    path = Path(model)
    if (path / "config.json").is_file():
        return path.resolve()
    if path.is_dir() or model.startswith((".", "/", "~")):
        raise ConfigError(f"there is no model at {model}: it has no config.json")
    return None
