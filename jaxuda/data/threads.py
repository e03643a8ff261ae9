"""Maps files ahead of their use, in threads."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

_THREADS = 4  # decoding releases the interpreter lock


def map_ahead(function: Callable[[Any], Any], items: Sequence) -> Iterator:
    """Maps in threads; results come in order, and few of them are in memory."""
    remaining = iter(items)
    with ThreadPoolExecutor(_THREADS) as pool:
        pending = deque(pool.submit(function, item) for item in islice(remaining, 2 * _THREADS))
        try:
            while pending:
                result = pending.popleft().result()
                pending.extend(pool.submit(function, item) for item in islice(remaining, 1))
                yield result
        finally:
            for future in pending:
                future.cancel()
