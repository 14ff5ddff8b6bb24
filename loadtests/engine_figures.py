"""What bench_engine.py makes of the times that it took: figures, their tables, and one table of several runs."""

from __future__ import annotations

import gzip
import json
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Stock multi-LoRA by its adapters: on what ttt adapts, at its rank; and on every linear layer (the name in older results is
#: that of the second).
SAME, EVERYWHERE = "stock multi-LoRA, ttt's modules and rank", "stock multi-LoRA, all layers"


@dataclass
class Round:
    """What some requests that were handed over at once took. Seconds, one entry per request where it is a list."""

    tokens: int
    learned: int
    #: until the last answer, and until the last commit is done too
    wall: float
    drained: float
    #: tokens a second from when every request has its first until the last of all
    decode: float
    #: to the first token
    ttft: list[float]
    #: from the first token to the last, per token after the first (as `vllm bench serve` counts)
    tpot: list[float]
    #: between one token and the next, of all requests
    itl: list[float]


def decode_rate(times: list[list[float]]) -> float:
    """Tokens over time while requests decode.

    Args:
        times: when each token of each request came.
    Returns:
        tokens a second that came after every request had its first; where none came then, after anybody had it.
    """
    end = max(t[-1] for t in times)
    for begin in (max(t[0] for t in times), min(t[0] for t in times)):
        if end > begin:
            return sum(token > begin for t in times for token in t) / (end - begin)
    return 0.0


def figures(rounds: list[Round]) -> dict[str, Any]:
    """Medians over rounds of what belongs to a round; quantiles over the requests, or tokens, of all rounds."""
    pooled = lambda name: sorted(x for r in rounds for x in getattr(r, name))  # noqa: E731
    p99 = lambda values: 1e3 * values[int(len(values) * 0.99)] if values else 0.0  # noqa: E731
    p50 = lambda values: 1e3 * statistics.median(values) if values else 0.0  # noqa: E731
    over = lambda count: statistics.median(count(r) for r in rounds)  # noqa: E731
    ttft, tpot, itl = pooled("ttft"), pooled("tpot"), pooled("itl")
    return {
        "wall_s": over(lambda r: r.wall),
        "drained_s": over(lambda r: r.drained),
        "tokens_per_s": over(lambda r: r.tokens / r.wall),
        "tokens_per_s_drained": over(lambda r: r.tokens / r.drained),
        "learned_per_s": over(lambda r: r.learned / r.drained),
        "decode_rate": over(lambda r: r.decode),
        "ttft_mean_ms": 1e3 * statistics.mean(ttft),
        "ttft_p99_ms": p99(ttft),
        "tpot_p50_ms": p50(tpot),
        "tpot_p99_ms": p99(tpot),
        "itl_p99_ms": p99(itl),
        #: of each round, in the order in which they ran: whether the machine changed meanwhile
        "rounds_tokens_per_s": [round(r.tokens / r.wall, 1) for r in rounds],
    }


def merge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One arm, from the processes that it ran in: their rounds count as rounds of one."""
    merged = dict(runs[0], startup_s=[run["startup_s"] for run in runs], cases={})
    for name, sizes in runs[0]["cases"].items():
        for size in sizes:
            rounds = [Round(**r) for run in runs for r in run["cases"][name][size]]
            merged["cases"].setdefault(name, {})[size] = figures(rounds)
    if "together" in merged:
        merged["together"] = statistics.median(run["together"] for run in runs)
    return merged


def decode(values: dict[str, Any]) -> float:
    """Tokens a second; in results from before 2026-11-29 from the median gap between two tokens of a request."""
    return values["decode_rate"] if "decode_rate" in values else values["decode_tokens_per_s"]


def reference_of(report: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What the others are compared with: stock vLLM, or without it ttt without sessions; its figures by batch."""
    arms = report["arms"]
    name = "stock" if "stock" in arms else "idle"
    return name, arms["stock" if "stock" in arms else "ttt"]["cases"][name]


def table(report: dict[str, Any]) -> str:
    """Markdown: each case as ratios to stock, or without it to idle ttt, which is given in full."""
    head = ["case", "batch", "decode tok/s", "tok/s", "tok/s, all learned", "TTFT mean", "TTFT p99", "TPOT p50", "TPOT p99",
            "ITL p99", "learned tok/s"]  # fmt: skip
    keys = ["tokens_per_s", "tokens_per_s_drained", "ttft_mean_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "itl_p99_ms"]
    row = lambda values: [decode(values), *(values[key] for key in keys)]  # noqa: E731
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    reference, stock = reference_of(report)
    for size, values in stock.items():
        lines.append(f"| {reference} | {size} | " + " | ".join(f"{v:,.1f}" for v in row(values)) + " | |")
    for arm in report["arms"].values():
        for name, sizes in arm["cases"].items():
            for size, values in sizes.items():
                if name != reference and size in stock:
                    pairs = zip(row(values), row(stock[size]), strict=True)
                    ratios = (v / s if s else float("nan") for v, s in pairs)
                    learned = f" | {values['learned_per_s']:,.0f} |" if values["learned_per_s"] else " | |"
                    lines.append(f"| {name} / {reference} | {size} | " + " | ".join(f"{r:.3f}" for r in ratios) + learned)
    return "\n".join(lines)


def memory_table(report: dict[str, Any]) -> str:
    """Markdown: what the engines hold. vLLM fills its share of the device with KV cache, so what ttt takes is missing there."""
    arms = report["arms"]
    lines = [f"| engine | device MiB in use | KV cache, tokens | / {next(iter(arms))} |", "| --- | --- | --- | --- |"]
    stock = next(iter(arms.values()))["kv_tokens"]
    for name, arm in arms.items():
        used = "" if arm["device_mib"] is None else f"{arm['device_mib']:,}"
        lines.append(f"| {name} | {used} | {arm['kv_tokens']:,} | {arm['kv_tokens'] / stock:.3f} |")
    return "\n".join(lines)


#: Rows of `comparison`: a label, and what it is of a report's cases and their reference at the largest batch.
ROWS = [
    ("decode throughput, no session in the batch", "idle", decode),
    ("decode throughput, sessions that do not learn", "frozen", decode),
    ("decode throughput, " + SAME, SAME, decode),
    ("decode throughput, " + EVERYWHERE, EVERYWHERE, decode),
    ("all throughput until the last commit, sessions that learn their prompts", "learn prompts",
     lambda values: values["tokens_per_s_drained"]),
    ("TPOT p99 while they learn", "learn prompts", lambda values: values["tpot_p99_ms"]),
    ("time between two tokens, p99, while they learn", "learn prompts", lambda values: values["itl_p99_ms"]),
    ("mean time to the first token while they learn", "learn prompts", lambda values: values["ttft_mean_ms"]),
]  # fmt: skip


def comparison(files: list[str]) -> str:
    """Markdown: one column per result file, ratios to the reference of the same run.

    Args:
        files: ``PATH`` or ``PATH=HEAD``, where ``HEAD`` says what was run, in a few words.
    """
    columns = [_column(*file.partition("=")[::2]) for file in files]
    heads = list(dict.fromkeys(row for column in columns for row in column))
    rows = [[head, *(column.get(head, "") for column in columns)] for head in heads]
    rows = [row for row in rows if any(row[1:])]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|" + " --- |" * (1 + len(files)), *lines[1:]])


def _column(path: str, head: str) -> dict[str, str]:
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    arms, (reference, stock) = report["arms"], reference_of(report)
    size = max(stock, key=int)
    cases = {name: sizes[size] for arm in arms.values() for name, sizes in arm["cases"].items() if size in sizes}
    if "stock multi-LoRA" in cases:
        cases[EVERYWHERE] = cases["stock multi-LoRA"]
    column = {"": head or f"{report['hardware']}, {report['date']}", "requests at once": size, "beside": reference}
    for label, case, figure in ROWS:
        value = figure(cases[case]) / figure(stock[size]) if case in cases and case != reference else None
        column[label] = "" if value is None else f"{value:.3f}"
    ttt = arms.get("ttt", {})
    column["tokens that fit into the KV cache"] = ""
    if ttt and "stock" in arms and "kv_cache_memory_bytes" not in report.get("command", ""):  # which makes all caches one size
        column["tokens that fit into the KV cache"] = f"{ttt['kv_tokens'] / arms['stock']['kv_tokens']:.3f}"
    column["8 sessions together / one after the other"] = f"{ttt['together']:.2f}" if "together" in ttt else ""
    over_time = "decode_rate" in stock[size]
    column["decode throughput is from"] = "tokens over time" if over_time else "the median gap"
    return column


def kernels(folder: str) -> dict[str, Counter[str]]:
    """Case -> how often each kernel ran, from the profiler's traces below ``folder``."""
    found: dict[str, Counter[str]] = {}
    for path in sorted(Path(folder).glob("*/*.trace.json.gz")):
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
        found[path.name.split("_rank")[0]] = Counter(e["name"] for e in events if e.get("cat") == "kernel")
    return found


def kernel_table(found: dict[str, Counter[str]]) -> str:
    """Markdown: kernels in all, and those by name that the cases do not run equally often."""
    names = sorted({n for c in found.values() for n in c}, key=lambda n: -max(c[n] for c in found.values()))
    unequal = [n for n in names if len({c[n] for c in found.values()}) > 1]
    lines = ["| kernel | " + " | ".join(found) + " |", "|" + " --- |" * (len(found) + 1)]
    lines.append("| all | " + " | ".join(str(c.total()) for c in found.values()) + " |")
    lines += [f"| `{n[:90]}` | " + " | ".join(str(c[n]) for c in found.values()) + " |" for n in unequal[:25]]
    return "\n".join(lines)
