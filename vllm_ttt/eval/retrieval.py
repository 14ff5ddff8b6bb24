"""The baselines that remember without learning: what the session sent before is put before its request.

The chunks that BM25 (Robertson & Zaragoza 2009) finds, or simply the last documents.
"""

from __future__ import annotations

#: Tokens of a chunk, and how many are put before a request.
CHUNK, CHUNKS = 128, 8
#: Tokens of the request that are searched with: what precedes the ones that P2 scores.
QUERY = 256


def retrieve(earlier: list[list[int]], request: list[int], room: int) -> list[int]:
    """Token ids to put before ``request``: the CHUNKS best chunks of ``earlier``, in the order in which they were sent.

    Words are token ids, which any model's tokenizer gives and which need no language.

    Args:
        earlier: the session's earlier requests, token ids.
        request: searched with its first QUERY tokens only, so that nothing of what is scored helps to find it.
        room: tokens that fit before ``request``; the result is cut at its beginning to fit.
    """
    chunks = [ids[start : start + CHUNK] for ids in earlier for start in range(0, len(ids), CHUNK)]
    chunks = [ids for ids in chunks if len(ids) == CHUNK]
    if not chunks or room <= 0:
        return []
    import bm25s

    index = bm25s.BM25()
    index.index([[str(token) for token in ids] for ids in chunks], show_progress=False)
    query = [[str(token) for token in request[:QUERY]]]
    best, _ = index.retrieve(query, k=min(CHUNKS, len(chunks)), show_progress=False)
    found = [token for i in sorted(int(i) for i in best[0]) for token in chunks[i]]
    return found[-room:]


def recent(earlier: list[list[int]], documents: int, room: int) -> list[int]:
    """Token ids to put before a request: the last ``documents`` of ``earlier``, in the order in which they were sent.

    Args:
        room: tokens that fit before the request; the oldest document is cut at its beginning to fit.
    """
    if documents <= 0 or room <= 0:
        return []
    return [token for ids in earlier[-documents:] for token in ids][-room:]
