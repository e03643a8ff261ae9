"""Batches for training and for sweeps.

Training batches come from one Grain pipeline; its batch k depends only on the seed and k: the number of
workers may change between runs, and a run resumes by building the pipeline again from `start`.
"""

import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cv2
import grain.python as grain
import numpy as np
from absl import flags
from grain.experimental import ZipMapDataset

from jaxuda.data.transforms import Record, Transform
from jaxuda.errors import UserError

Batch = dict[str, Any]
# Enough to keep two cores busy; more threads only wait for each other, more buffered batches only take
# memory.
_THREADS = min(4, os.cpu_count() or 1)
_BUFFERED_BATCHES = 4


class Draws(NamedTuple):
    """The records to draw, in order, and a class that each of their crops should show.

    indices: (n,) integers.
    classes: (n,) train ids, or None: the crops are free.
    pixels: (n,) numbers; a crop with more pixels of its class than this is taken, see `TransformSpec`.
    """

    indices: np.ndarray
    classes: np.ndarray | None = None
    pixels: np.ndarray | None = None


def make_input(
    source: Sequence[Record],
    target: Sequence[Record] | None = None,
    *,
    batch: int,
    steps: int,
    start: int = 0,
    seed: int = 0,
    source_transform: Transform,
    target_transform: Transform | None = None,
    target_labels: bool = False,
    source_order: Sequence[int] | np.ndarray | Draws | None = None,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> "BatchIterator":
    """Makes the training batches of steps `start` .. `steps` - 1.

    Each domain is shuffled anew every epoch and repeated without end, independently of the other: their sizes
    may differ and may be smaller than a batch. A record is transformed with a random generator that depends on
    the seed, the domain and the number of records before it.

    Args:
      source: labelled records.
      target: records of which only the images are used; their labels do not enter a training batch.
      batch: global batch size B, over all processes.
      source_transform, target_transform: see `build_transform`; they must bring all images to one size.
      target_labels: puts the target's labels, if it has any, into the batches after all, for figures that are
        marked as using them.
      source_order: the source records to draw, steps * batch of them, as `Draws` or indices (see
        `jaxuda.data.orders`); None: shuffled anew every epoch.
      num_workers: processes that decode and transform; 0 uses threads of this one.
      process_index, process_count: this process gets rows process_index * b .. (process_index + 1) * b - 1
        of each global batch, b = B / process_count.

    Returns:
      An iterator, to be closed after use, over {"source": {"image" (b, H, W, 3) uint8, "label" (b, H, W)
      uint8, "depth" (b, H, W) float32 if the dataset has it, "id" list of str},
      "target": {"image", "id", with `target_labels` "label", "reference" as "image" if the records have it,
      with margins "trusted" (b, H, W) uint8}}.

    Raises:
      UserError: a dataset is empty or the source unlabelled, the number of processes does not divide the
        batch, the target's crops are to be balanced, or, while iterating, images of a batch differ in size.
    """
    if batch < 1 or batch % process_count:
        raise UserError(f"a batch of {batch} cannot be divided between {process_count} processes")
    count = steps * batch
    domains = {"source": _stream(source, source_transform, seed, "source", count, source_order)}
    if target is not None:
        if target_transform is None:
            raise UserError("the target has no transform")
        if getattr(target_transform, "balanced", None):
            raise UserError(
                "config.target.balanced chooses crops by their labels, which a stage that adapts to the target must "
                "not read: unset it"
            )
        domains["target"] = _stream(target, target_transform, seed, "target", count, keep_labels=target_labels)
    examples = ZipMapDataset(list(domains.values()))
    batches = examples.batch(batch // process_count, batch_fn=_Collate(tuple(domains)))
    batches = batches[process_index::process_count][start:steps]
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_BUFFERED_BATCHES)
    if num_workers:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    dataset = batches.to_iter_dataset(options)
    if num_workers:
        _mark_flags_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers), _start_worker)
    return BatchIterator(iter(dataset), shared=num_workers > 0)


class BatchIterator:
    """Iterates over batches; `close` stops the threads and processes behind it. Also a context manager."""

    def __init__(self, batches: grain.DatasetIterator, *, shared: bool):
        self._batches, self._shared = batches, shared

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            raise UserError(
                "a process that prepares data has died, perhaps for lack of memory: the same command continues the "
                "run; fewer such processes (--config.num_workers) take less memory"
            ) from error
        # Batches of worker processes are in Grain's shared memory; a copy frees it at once.
        return _copied(batch) if self._shared else batch

    def close(self) -> None:
        """Stops reading ahead and ends the workers; may be called twice."""
        self._batches.close()

    def __enter__(self) -> "BatchIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _copied(batch: Batch) -> Batch:
    return {
        domain: {key: np.array(v) if isinstance(v, np.ndarray) else v for key, v in part.items()}
        for domain, part in batch.items()
    }


def _stream(
    records: Sequence[Record],
    transform: Transform,
    seed: int,
    domain: str,
    count: int,
    order: Sequence[int] | np.ndarray | Draws | None = None,
    keep_labels: bool = True,
) -> grain.MapDataset:
    """The first `count` records of a domain, in a given order or shuffled and repeated without end; transformed."""
    if not len(records):
        raise UserError(f"the {domain} dataset is empty")
    if not keep_labels and hasattr(records, "images_only"):
        records = records.images_only()
    if domain == "source" and not getattr(records, "labelled", True):
        raise UserError(f"{records.name} has no labels, so it cannot be a source")
    if order is None:
        dataset = _shuffled(records, count, seed, domain)
    else:
        draws = order if isinstance(order, Draws) else Draws(np.asarray(order))
        if (drawn := len(draws.indices)) < count:
            raise UserError(f"the order of the {domain} has {drawn} entries, but {count} records are to be drawn")
        dataset = grain.MapDataset.source(_Ordered(records, draws)).seed(_domain_seed(seed, domain))
    keys = ("image", "id", "wanted", *(("label",) if keep_labels else ()))
    keys += ("depth",) if domain == "source" else ("reference",)
    return dataset.random_map(_TransformKeys(transform, keys))[:count]


def _domain_seed(seed: int, domain: str) -> int:
    """A seed per domain: domains draw from unrelated streams, and so do runs with neighbouring seeds."""
    return int(np.random.SeedSequence([seed, domain == "target"]).generate_state(1)[0])


def _shuffled(records: Sequence, count: int, seed: int, domain: str) -> grain.MapDataset:
    """At least `count` records, shuffled anew every epoch."""
    epochs = max(1, -(-count // len(records)))
    return grain.MapDataset.source(records).seed(_domain_seed(seed, domain)).shuffle().repeat(epochs)


def draw_order(length: int, count: int, seed: int, domain: str) -> np.ndarray:
    """Indices of the first `count` records that `make_input` draws from a domain of `length` without `source_order`."""
    dataset = _shuffled(range(length), count, seed, domain)
    return np.array([dataset[index] for index in range(count)], np.int32)


class _Ordered(Sequence):
    """Records in a given order, in which some may come often and others never; with "wanted", see `TransformSpec`."""

    def __init__(self, records: Sequence[Record], draws: Draws):
        self._records, self._draws = records, draws

    def __len__(self) -> int:
        return len(self._draws.indices)

    def __getitem__(self, index: int) -> Record:
        indices, classes, pixels = self._draws
        record = self._records[int(indices[index])]
        return record if classes is None else {**record, "wanted": (int(classes[index]), float(pixels[index]))}


class _TransformKeys:
    """Transforms the named entries of a record and drops the others. It is a class because workers unpickle it."""

    def __init__(self, transform: Transform, keys: tuple[str, ...]):
        self._transform, self._keys = transform, keys

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        return self._transform({key: record[key] for key in self._keys if key in record}, rng)


class _Collate:
    """Stacks examples (tuples with one record per domain) to a batch."""

    def __init__(self, domains: tuple[str, ...]):
        self._domains = domains

    def __call__(self, examples: Sequence[tuple[Record, ...]]) -> Batch:
        return {domain: _stack([e[k] for e in examples]) for k, domain in enumerate(self._domains)}


def _stack(records: Sequence[Record]) -> Batch:
    shapes = {record["image"].shape[1::-1]: record["id"] for record in records}
    if len(shapes) > 1:
        sizes = ", ".join(f"{name} {width}x{height}" for (width, height), name in shapes.items())
        raise UserError(f"images of a batch differ in size: {sizes}; give the transform a resize or a crop")
    return {
        key: [r[key] for r in records] if key == "id" else np.stack([r[key] for r in records]) for key in records[0]
    }


def _mark_flags_as_parsed() -> None:
    """Grain reads absl flags when it starts workers, which fails if they were never parsed (in tests)."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _start_worker(_index: int, _count: int) -> None:
    """One OpenCV thread per worker, since the workers share the cores already; no worker outlives the run."""
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker with its parent: a killed run cannot stop its workers, which would wait without end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def sweep_batches(records: Sequence[Record], transform: Transform, batch: int) -> Iterator[Batch]:
    """Goes through all records once, in order, for evaluation and other sweeps.

    Images are transformed, labels keep their size. The last batch is filled up by repeating its last image, so
    that all batches have one shape. Decoding runs ahead in threads.

    Yields:
      {"image" (B, H, W, 3) uint8, "count": number of valid examples n, "label": list of n (H_i, W_i) uint8
      or None if there are none, "id": list of n str, "size": list of n (height, width) as stored}.

    Raises:
      UserError: images of a batch differ in size after the transform.
    """
    starts = iter(range(0, len(records), batch))
    with ThreadPoolExecutor(_THREADS) as pool:

        def submit(first: int) -> list:
            rows = range(first, min(first + batch, len(records)))
            return [pool.submit(_sweep_record, records, transform, row) for row in rows]

        # One batch is in use while the next two are decoded.
        pending = deque(submit(first) for first in itertools.islice(starts, 2))
        try:
            while pending:
                pending.extend(submit(first) for first in itertools.islice(starts, 1))
                rows = [future.result() for future in pending.popleft()]
                yield _sweep_batch(rows, batch)
        finally:
            for future in itertools.chain.from_iterable(pending):
                future.cancel()


def _sweep_record(records: Sequence[Record], transform: Transform, index: int) -> Record:
    record = records[index]
    # A transform for sweeps is not random; if it were, every sweep would draw the same.
    image = transform({"image": record["image"]}, np.random.default_rng(index))["image"]
    return {**record, "image": image, "size": record["image"].shape[:2]}


def _sweep_batch(rows: list[Record], batch: int) -> Batch:
    images = _stack([{"image": row["image"], "id": row["id"]} for row in rows])["image"]
    padding = np.repeat(images[-1:], batch - len(rows), axis=0)
    return {
        "image": np.concatenate([images, padding]),
        "count": len(rows),
        "label": [row["label"] for row in rows] if "label" in rows[0] else None,
        "id": [row["id"] for row in rows],
        "size": [row["size"] for row in rows],
    }


def prefetch_to_device(batches: Iterable[Batch], put: Callable[[Any], Any], depth: int = 2) -> Iterator[Batch]:
    """Copies `depth` batches to the device while one is in use.

    Args:
      batches: nested dicts; NumPy arrays go to the device, all else (ids, counts, lists) stays on the host.
      put: places a nested dict of arrays on the device without waiting, such as `jax.device_put`.
      depth: number of batches ahead.
    """
    batches = iter(batches)
    ahead = deque()
    while True:
        for batch in itertools.islice(batches, depth + 1 - len(ahead)):
            ahead.append(_merge(batch, put(_arrays(batch))))
        if not ahead:
            return
        yield ahead.popleft()


def _arrays(tree: Mapping[str, Any]) -> Batch:
    """The arrays of a nested dict, without the other leaves."""
    return {
        key: _arrays(value) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if isinstance(value, (Mapping, np.ndarray))
    }


def _merge(tree: Mapping[str, Any], placed: Mapping[str, Any]) -> Batch:
    """`tree` with its arrays replaced by the placed ones."""
    return {
        key: _merge(value, placed[key]) if isinstance(value, Mapping) else placed.get(key, value)
        for key, value in tree.items()
    }
