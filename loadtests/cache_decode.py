"""What sessions' caches cost a full batch: tokens a second that it decodes with them, over those with `ttt_cache: 0`.

    python loadtests/cache_decode.py demo/real/smollm2
    python loadtests/dummy_model.py /tmp/qwen3-8b && python loadtests/cache_decode.py /tmp/qwen3-8b --load-format dummy

Each session is sent so many tokens of the demo's texts first, from another place on. Then all answer at once, and learn
nothing; their prompts are pieces of what they were sent; with and without, in turns. A model without weights is unsure of
everything: its answers follow the caches from one known context to the next, so that no lookup ends early.

With --kernels the two kernels alone are timed instead, on CUDA, beside a vocabulary of each size: no model is needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from statistics import median
from typing import Any

from gate import Gate
from runs import DEMO, HERE, about, save

from vllm_ttt.eval.texts import read_texts

ORDERS, PIECE, PROMPT = 6, 1000, 40
WAYS = {"without": {"ttt_learn": 0, "ttt_cache": 0}, "with": {"ttt_learn": 0}}


def config(sessions: int) -> dict[str, Any]:
    """Whatever is sent is learned, and the guard has no say."""
    guard = {"every": 0, "hourly_tokens": 0, "hourly_tokens_per_key": 0}
    return {"cache": {"orders": ORDERS}, "guard": guard, "learn": {"max_loss": 2.0}, "sessions": {"resident": sessions}}


def pieces_of_text(tokenizer: Any, sessions: int, tokens: int) -> list[list[int]]:
    """What each session is sent: the demo's texts, documents of all domains in turns, over and over."""
    documents = itertools.chain.from_iterable(zip(*read_texts(DEMO / "texts").values(), strict=False))
    ids = [token for document in documents for token in tokenizer.encode(document, add_special_tokens=False)]
    return [[ids[(997 * i + t) % len(ids)] for t in range(tokens)] for i in range(sessions)]


def ask(llm: Any, prompts: list[list[int]], knobs: dict[str, int], tokens: int) -> float:
    """Hand a request of each session over; the tokens a second that they decode together."""
    from engine_figures import decode_rate
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, times = llm.llm_engine, dict[str, list[float]]()
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        params.detokenize, params.extra_args = False, {"session_id": f"s{i}", **knobs}
        engine.add_request(f"{time.monotonic()}-{i}", {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        outputs, now = engine.step(), time.perf_counter()
        for output in outputs:
            times.setdefault(output.request_id, []).extend([now] * len(output.outputs[0].token_ids))
    return decode_rate(list(times.values()))


def decode(args: argparse.Namespace) -> None:
    from transformers import AutoTokenizer
    from vllm import LLM

    import vllm_ttt

    told = about("cache_decode.py")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model" if args.load_format == "dummy" else args.model)
    texts = pieces_of_text(tokenizer, args.sessions, args.tokens)
    options: dict[str, Any] = {"max_model_len": 2048, "load_format": args.load_format, **json.loads(args.options)}
    settings = config(args.sessions)
    settings["adapt"] = {"preset": args.preset}
    llm = LLM(model=args.model, **options, **vllm_ttt.engine_args(config=settings))
    begin = time.perf_counter()
    for start in range(0, args.tokens, PIECE):
        ask(llm, [ids[max(0, start - 1) : start + PIECE] for ids in texts], {}, 1)
    ask(llm, [ids[:PROMPT] for ids in texts], WAYS["with"], 1)  # all is learned
    known = sum(x["cache_tokens"] for x in llm.collective_rpc("ttt_sessions", args=(list(range(4 * args.sessions)),))[0])
    print(f"{known:,} tokens are remembered after {time.perf_counter() - begin:.0f} s", flush=True)
    if known < 0.9 * args.sessions * args.tokens:
        raise SystemExit("that is not what was sent")
    gate = Gate(args)
    rows, apart = [], (args.tokens - PROMPT) // (args.rounds + 1)
    for number in range(args.rounds + 1):
        prompts = [ids[apart * number : apart * number + PROMPT] for ids in texts]
        order = list(WAYS) if number % 2 else list(WAYS)[::-1]
        with gate.turn():
            found = {way: ask(llm, prompts, WAYS[way], args.answer) for way in order}
        if number:  # the first one warms up
            rows.append(found)
            print({way: round(x, 1) for way, x in found.items()}, flush=True)
    without, with_it = ([row[way] for row in rows] for way in WAYS)
    errors = sum(worker["errors"] for worker in llm.collective_rpc("ttt_status"))
    body = (
        f"{args.sessions} sessions, whose caches remember {known:,} tokens; {args.rounds} rounds of {args.answer} tokens each; "
        f"{errors} errors.\n\n| decode tok/s | without | with | ratio |\n| --- | --- | --- | --- |\n"
        f"| median | {median(without):,.1f} | {median(with_it):,.1f} "
        f"| {median(a / b for a, b in zip(with_it, without, strict=True)):.3f} |"
    )
    save("What sessions' caches cost a full batch", told | {"cache_tokens": known, "rows": rows}, body, args.out, args.name)


def kernels(args: argparse.Namespace) -> None:
    """The device's and the host's time of one call, for a row of each session."""
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    from vllm_ttt.config import CacheConfig
    from vllm_ttt.worker.ngrams import stream as streams
    from vllm_ttt.worker.ngrams.index import Index
    from vllm_ttt.worker.ngrams.mixing_cuda import mix
    from vllm_ttt.worker.ngrams.ngrams import NGrams
    from vllm_ttt.worker.ngrams.tables import Tables, places

    told, device = about("cache_decode.py"), torch.device("cuda")
    texts = pieces_of_text(AutoTokenizer.from_pretrained(DEMO / "model"), args.sessions, args.tokens)
    tables, limit = Tables(args.sessions, CacheConfig(orders=ORDERS), device), 65536
    begin = time.perf_counter()
    indexes = list[Index]()
    for key, ids in enumerate(texts):
        text = np.array(ids, np.int32)
        ngrams = NGrams(streams.extend(streams.EMPTY, text[:1], text[1:], limit), NGrams.fresh(ORDERS).experience)
        indexes.append(Index(ngrams.stream, ORDERS))
        tables.row(key, ngrams, lambda _: indexes[-1], ())
    built = 1e3 * (time.perf_counter() - begin) / args.sessions
    tokens = torch.tensor(texts, dtype=torch.int32, device=device)
    lines = ["| vocabulary | rows | device, µs | host, µs |", "| --- | --- | --- | --- |"]
    where, indices = places(tables, *[list(range(args.sessions))] * 2), torch.arange(args.sessions, device=device)
    for vocabulary in (49_152, 151_936):
        logits, took = torch.randn(args.sessions, vocabulary, device=device).bfloat16(), list[float]()
        positions = torch.full((args.sessions,), args.tokens // 2, device=device)
        mix(logits, where, indices, positions, tokens, tables)
        begin = time.perf_counter()
        for _ in range(100):
            mix(logits, where, indices, positions, tokens, tables)
        launched = 1e4 * (time.perf_counter() - begin)
        graph = torch.cuda.CUDAGraph()  # so that the device waits for no launch
        with torch.cuda.graph(graph):
            for _ in range(20):
                mix(logits, where, indices, positions, tokens, tables)
        for step in range(100):
            positions.fill_(50 + 97 * step % (args.tokens - 100))
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            took.append(50 * start.elapsed_time(end))
        lines.append(f"| {vocabulary:,} | {args.sessions} | {median(took):.1f} | {launched:.1f} |")
    body = "\n".join(lines) + f"\n\nBuilding the index of {args.tokens:,} tokens and sending it to the device: {built:.1f} ms."
    save("The kernels that mix caches in", told | {"built_ms": built}, body, args.out, f"{args.name}-kernels")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="not with --kernels")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--preset", default="deep")
    parser.add_argument("--options", default="{}", help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=20_000, help="that each session is sent")
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    Gate.add_arguments(parser)
    parser.add_argument("--out", default=str(HERE / "results"))
    parser.add_argument("--name", default="cache-decode")
    args = parser.parse_args()
    if args.kernels:
        kernels(args)
    elif args.model is None:
        parser.error("a model, or --kernels, is needed")
    else:
        decode(args)


if __name__ == "__main__":
    main()
