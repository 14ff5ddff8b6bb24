"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_ttt.errors import TTTError
from vllm_ttt.sessions.audit import app as audit
from vllm_ttt.sessions.commands import app as sessions

app = typer.Typer(
    name="vllm-ttt",
    help="Models that keep learning while they serve: test-time training per session, as a plugin for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(sessions, name="sessions")
app.add_typer(audit, name="audit")


def main() -> None:
    """The console script. ``serve`` hands its arguments on before anybody parses them: they are vLLM's."""
    if sys.argv[1:2] == ["serve"]:
        _serve(sys.argv[2:])
        return
    try:
        app()
    except TTTError as error:
        typer.echo(f"vllm-ttt: {error}", err=True)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        from vllm_ttt.metadata import ensure_vllm_metadata

        typer.echo(f"vllm-ttt {version('vllm-ttt')} (vLLM {ensure_vllm_metadata() or 'is not installed'})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions.")] = False,
) -> None:
    pass


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    short_help="`vllm serve MODEL ... --plugin ttt`; all options are vLLM's.",
)
def serve(context: typer.Context) -> None:
    """The same as `vllm serve MODEL ... --plugin ttt`. Every argument, --help too, goes to vLLM untouched."""
    _serve(context.args)


def _serve(args: list[str]) -> None:
    from vllm_ttt.metadata import ensure_vllm_metadata

    if ensure_vllm_metadata() is None:
        typer.echo("vllm-ttt: vLLM is not installed; pip install 'vllm-ttt[cuda]', or run make setup", err=True)
        sys.exit(1)
    named = [*zip(args, [*args[1:], ""], strict=True), *(tuple(a.split("=", 1)) for a in args if "=" in a)]
    plugin = [] if ("--plugin", "ttt") in named else ["--plugin", "ttt"]
    sys.argv = ["vllm", "serve", *args, *plugin]
    from vllm.entrypoints.cli.main import main as vllm_main

    try:
        vllm_main()
    except TTTError as error:
        sys.exit(f"vllm-ttt: {error}")


@app.command()
def demo(
    model: Annotated[str | None, typer.Option(help="Folder or hub name; default: the model of `make real`.")] = None,
    out: Annotated[Path, typer.Option(help="Where the plot, the figures and the server's log go.")] = Path("demo/out"),
    port: Annotated[int | None, typer.Option(help="Port on 127.0.0.1; default: a free one.")] = None,
    keep: Annotated[bool, typer.Option("--keep", envvar="KEEP", help="Leave the server running.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer documents, fewer sessions.")] = False,
) -> None:
    """Start a server whose sessions read this project, and compare them with the frozen model and with what else remembers."""
    from rich.console import Console

    from vllm_ttt.eval.demo import demo as run

    run(model, out, port, keep, quick, Console())


@app.command("eval")
def evaluate(
    texts: Annotated[Path, typer.Option(help="Folder of <domain>/*.txt.")],
    base_url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    protocol: Annotated[
        str, typer.Option(help="p2 (different documents), p3 (one document again), long (many), or all (p2 and p3).")
    ] = "all",
    model: Annotated[str | None, typer.Option(help="Served model name; default: the server's first.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="The server's API key.")] = None,
    sessions_per_domain: Annotated[int, typer.Option(min=1)] = 2,
    interactions: Annotated[int, typer.Option(min=2, help="Requests of a session in p2.")] = 10,
    passes: Annotated[int, typer.Option(min=2, help="Requests of a session in p3.")] = 4,
    documents: Annotated[int, typer.Option(min=11, help="Requests of a session in long.")] = 40,
    baselines: Annotated[
        str, typer.Option(help="Some of bm25, context, ngrams, with commas; or none.")
    ] = "bm25,context,ngrams",
    context_documents: Annotated[int, typer.Option(min=1, help="Documents that context puts before a request, at most.")] = 7,
    frozen_only: Annotated[bool, typer.Option("--frozen-only", help="No sessions: works on any vLLM.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the curves here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curves here (.png, .svg, .pdf).")] = None,
    reference: Annotated[Path | None, typer.Option(help="Curves of an earlier --json to compare with.")] = None,
) -> None:
    """Measure what sessions gain on your texts, on a server that runs. docs/eval.md says what is measured, and beside what."""
    import asyncio

    from rich.console import Console

    from vllm_ttt.eval import plots, report, runner
    from vllm_ttt.eval import texts as reader
    from vllm_ttt.eval.client import Client

    if protocol not in ("p2", "p3", "long", "all"):
        raise typer.BadParameter(f"{protocol!r}; allowed: p2, p3, long, all", param_hint="--protocol")
    asked = {name for name in baselines.split(",") if name not in ("", "none")}
    if unknown := asked - {"bm25", "context", "ngrams"}:
        allowed = "bm25, context, ngrams, or none"
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; allowed: {allowed}", param_hint="--baselines")
    wanted = {"p2", "p3"} if protocol == "all" else {protocol}
    counts = {name: n for name, n in {"p2": interactions, "p3": passes, "long": documents}.items() if name in wanted}
    arms = ("frozen", *sorted({"retrieval" if name == "bm25" else name for name in asked}))
    if not frozen_only:
        arms += ("ttt", *["ttt_ngrams"] * ("ngrams" in asked))
    console = Console()

    async def measure() -> tuple[dict[str, Any], str, str]:
        async with Client(base_url, model, api_key) as client:
            with console.status("reading the texts"):
                docs = await reader.encode(reader.read_texts(texts), client.tokenize)
            results = await runner.run(client, docs, counts, sessions_per_domain, console, arms, context_documents)
            return results, client.model, await client.preset()

    results, served, preset = asyncio.run(measure())
    console.print(report.table(results))
    for name, result in results.items():
        console.print(report.measures(name, result))
    if reference:
        for curve, difference in report.compare(report.curves(results, preset), json.loads(reference.read_text())).items():
            console.print(f"{reference.name}, {curve}: worst difference {difference:.4f} nats per token", soft_wrap=True)
    if json_file:
        runner.write_json(json_file, results, {"command": f"vllm-ttt {' '.join(sys.argv[1:])}", "model": served}, preset)
    if plot:
        plots.plot(results, plot, f"{served}: {len(next(iter(results.values())).domains)} sessions, mean")


@app.command()
def check(
    model: Annotated[str | None, typer.Argument(help="Model folder or name; default: check the installation only.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    preset: Annotated[
        str | None,
        typer.Option("--ttt-preset", help="deep, last or head; default: say of each whether it can serve the model."),
    ] = None,
    vllm_source: Annotated[
        Path | None,
        typer.Option(help="Folder or wheel of another vLLM: read its source, and say whether it has what vllm-ttt asks of it."),
    ] = None,
) -> None:
    """Is this vLLM supported, do the patched functions have the signatures we know, which presets can serve the model?"""
    from rich.console import Console
    from rich.table import Table

    from vllm_ttt.metadata import ensure_vllm_metadata

    ensure_vllm_metadata()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_ttt.config import PRESETS
    from vllm_ttt.plugin import check as run

    if preset is not None and preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r}; allowed: {', '.join(PRESETS)}", param_hint="--ttt-preset")
    if vllm_source is None:
        rows = run(model, preset)
    elif model is not None:
        raise typer.BadParameter("it says nothing of a model; leave MODEL out", param_hint="--vllm-source")
    else:
        from vllm_ttt.patches.source_check import check_source

        rows = check_source(vllm_source)
    if as_json:
        typer.echo(json.dumps([{"check": name, "ok": ok, "detail": detail} for name, ok, detail, _ in rows], indent=1))
    else:
        table = Table("check", "", "detail")
        for name, ok, detail, needed in rows:
            table.add_row(name, "[green]ok[/]" if ok else "[red]failed[/]" if needed else "no", detail)
        Console().print(table)
    if not all(row.ok for row in rows if row.needed):
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
