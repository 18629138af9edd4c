"""The batches of a training, and where they are in a stream that is read as it comes."""

import atexit
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader, default_collate

from ..data import ImageStream, Place, StreamedBatches
from .options import TrainingArguments
from .stopping import end_workers, ignore_signals


class Batches(Iterator[Any]):
    """Endless batches of images for this process, `(B, C, H, W)`, with their classes if `dataset` has any.

    Args:
        dataset: by the keys of `stream`; for `--streaming` a `TrainingImages`.
        stream: the order, where images are read by number.
        places: from a checkpoint: where each process was in a stream, see `places`.

    Raises:
        ValueError: if these were other processes or workers.
    """

    def __init__(
        self,
        args: TrainingArguments,
        dataset: Any,
        stream: ImageStream,
        accelerator: Accelerator,
        places: list[dict[str, Any]] | None,
    ):
        self._dataset, self._stream = dataset, stream
        self._places: list[Place] | None = None
        self._turn = 0
        workers, pinned = args.dataloader_num_workers, accelerator.device.type == "cuda"
        if workers:
            atexit.register(end_workers)
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": pinned, "worker_init_fn": ignore_signals}
        if not args.streaming:
            self._loader = iter(DataLoader(dataset, batch_sampler=stream, **options))
            return
        here = accelerator.num_processes, max(workers, 1)
        places = places or [{"turn": 0, "workers": [{}] * here[1]}] * here[0]
        before = len(places), len(places[0]["workers"])
        if before != here:
            raise ValueError(
                f"a stream goes on with as many processes and --dataloader_num_workers as before: {before[0]} x "
                f"{before[1]}, not {here[0]} x {here[1]}"
            )
        assert args.num_train_samples is not None
        mine = places[accelerator.process_index]
        self._turn, self._places = mine["turn"], [Place(**place) for place in mine["workers"]]
        batches = StreamedBatches(
            dataset,
            stream.batch_size,
            args.shuffle_buffer_size,
            args.num_train_samples,
            accelerator.num_processes,
            accelerator.process_index,
            list(self._places),
            self._turn,
        )
        self._loader = iter(DataLoader(batches, batch_size=None, **options))

    def __next__(self) -> Any:
        if self._places is None:
            return next(self._loader)
        images, place = next(batch for batch in self._loader if batch is not None)
        self._places[self._turn] = place
        self._turn = (self._turn + 1) % len(self._places)
        return images

    def places(self) -> dict[str, Any] | None:
        """Where the workers are, and whose turn is next; None where the number of images seen says all."""
        if self._places is None:
            return None
        return {"turn": self._turn, "workers": [asdict(place) for place in self._places]}

    def first(self) -> Any:
        """The batch that comes next."""
        if self._places is not None:
            return next(self)
        return default_collate(self._dataset.__getitems__(next(iter(self._stream))))
