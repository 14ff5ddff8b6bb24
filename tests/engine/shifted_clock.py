"""``vllm-ttt`` in a world whose clock the tests set: ``python -m shifted_clock serve ...``.

The wall clock is what it is plus the seconds that the file TTT_TEST_CLOCK holds; the time that passes, ``time.monotonic``, is
left as it is: so it goes where an operator or NTP sets a clock. Expired sessions are looked for every second, not every minute.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from vllm_ttt.engine.life import expiry

_REAL = time.time
_FILE = Path(os.environ["TTT_TEST_CLOCK"])


def _shifted() -> float:
    with contextlib.suppress(OSError, ValueError):
        return _REAL() + float(_FILE.read_text())
    return _REAL()


# At import: processes that are spawned import this module too, those that are forked inherit it.
time.time = _shifted
expiry.SWEEP = 1.0

if __name__ == "__main__":
    from vllm_ttt.cli import main

    main()
