"""PairLoader: the batches of one rank, decoded ahead of the training step.

Dims: V = 2 views of a pair (0 anchor, 1 positive), n pairs on this rank, H x W pixels, C channels.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from facetrain.batch import PairBatch
from facetrain.config import DataConfig
from facetrain.data.augment import draw_augmentations
from facetrain.data.cached import HeldShards
from facetrain.data.device_decode import check_decoder, decode_on_device
from facetrain.data.loader_worker import signals_kept_from_workers, start_worker
from facetrain.data.plan import Plan, StepPlan, pairs_per_rank
from facetrain.data.reading import FaceReader
from facetrain.data.shards import ShardSet


class PairLoader:
    """An iterator over one rank's batches of steps first_step to last_step - 1.

    The plan is asked in this process, so that mined lists count that come while the loader runs; whole batches are
    decoded in worker processes, into places of shared memory that are used again and again: to map new ones for each
    batch can take as long as a third of the decoding. With A = data.workers * data.prefetch batches ahead: `next` for
    step s draws the plan of steps up to and including s + A, and nothing beyond. So lists that are added before `next`
    for step s is called take effect from step s + A on, and `first_undrawn_step` is that step. Without workers A is 0.

    Workers are forked on Linux, unless `data.start_method` says otherwise: they start in milliseconds where spawn takes
    seconds to import torch, and share the class table's memory. They touch neither CUDA nor the process group.
    """

    def __init__(
        self,
        plan: Plan,
        shards: ShardSet,
        config: DataConfig,
        *,
        rank: int,
        world_size: int,
        first_step: int,
        last_step: int,
        device: torch.device | None = None,
    ) -> None:
        """Prepare the stream; no worker starts before the first `next`.

        Args:
            plan: Names the images of each step.
            shards: Holds the images.
            config: How images are decoded and augmented, workers and prefetch.
            rank: This rank, whose rows of each step are decoded.
            world_size: W.
            first_step: Step of the first batch: 0, or where a run resumes.
            last_step: One past the step of the last batch.
            device: Where batches are given out; None: the CPU. To a GPU they are copied beside what it computes.

        Raises:
            ValueError: W doesn't divide the plan's pairs.
        """
        self._held = HeldShards(shards.cache, shards.manifest.shards) if shards.cache is not None else None
        self._slices = _StepSlices(plan, rank, world_size, first_step, last_step, self._hold_for)
        self._ahead = config.workers * config.prefetch
        self._faces = _DecodedPairs(shards, config)
        self._pairs_here = pairs_per_rank(plan.global_pairs, world_size)
        check_decoder(config, device)
        self._config, self._device = config, device
        on_gpu = device is not None and device.type == "cuda"
        self._copy_to_gpu = _DeviceCopy(device) if device is not None and on_gpu else None
        with _silent_about_cores():
            self._loader: DataLoader[_Decoded | Exception] = DataLoader(
                self._faces,
                sampler=self._slices,
                batch_size=None,
                num_workers=config.workers,
                prefetch_factor=config.prefetch if config.workers else None,
                worker_init_fn=start_worker if config.workers else None,
                multiprocessing_context=config.start_method if config.workers and sys.platform == "linux" else None,
                # The DataLoader draws a seed for its workers: not from the global generator, or resuming would differ.
                generator=torch.Generator(),
            )
        self._batches: Iterator[_Decoded | Exception] | None = None
        self.wait_s = 0.0
        """Seconds that the last `next` took: with workers, how long the training step waited for its data."""

    @property
    def first_undrawn_step(self) -> int:
        """The first step whose plan isn't drawn yet; earlier ones no longer take mined lists."""
        return self._slices.next_step

    def __iter__(self) -> "PairLoader":
        return self

    def __next__(self) -> PairBatch:
        """Return the next step's batch.

        Raises:
            StopIteration: last_step is reached, or the loader is closed.
            ValueError: An image of the batch can't be read or decoded; the message names it. Or there is too little
                shared memory for the batches ahead.
        """
        called_at = time.perf_counter()
        if self._batches is None:
            if self._ahead and self._config.decode == "cpu":  # before the workers, which are to share it
                self._faces.make_places(self._ahead + 1, self._pairs_here)
            with _silent_about_cores(), signals_kept_from_workers(self._config):
                self._batches = iter(self._loader)
        decoded = next(self._batches)
        if isinstance(decoded, Exception):
            self.close()
            raise decoded
        batch = self._taken(decoded)
        self.wait_s = time.perf_counter() - called_at
        return batch

    def close(self) -> None:
        """End the workers and wait for them; batches that they hold are dropped."""
        # DataLoader has no public way to do so before its iterator is garbage collected.
        shut_down: Any = getattr(self._batches, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
        self._batches = iter(())
        if self._held is not None:
            self._held.close()

    def _taken(self, decoded: "_Decoded") -> PairBatch:
        """Return a batch in memory of its own: its place is used again by the step that the next `next` draws."""
        if decoded.jpegs_2n is not None:
            assert self._device is not None  # check_decoder
            changes = draw_augmentations(decoded.seeds_2n, self._config)
            images_VnHWC = decode_on_device(decoded.jpegs_2n, changes, self._config, self._device).unflatten(0, (2, -1))
            labels_n = torch.from_numpy(decoded.labels_n).to(self._device)
            return PairBatch(step=decoded.step, images_VnHWC=images_VnHWC, labels_n=labels_n)
        own = decoded.images_VnHWC
        images_VnHWC = self._faces.place_of(decoded.step) if own is None else own
        labels_n, replaced = torch.from_numpy(decoded.labels_n), tuple(decoded.replaced)
        batch = PairBatch(step=decoded.step, images_VnHWC=images_VnHWC, labels_n=labels_n, replaced=replaced)
        if self._copy_to_gpu is not None:
            return self._copy_to_gpu(batch.pin_memory())
        return batch if own is not None else replace(batch, images_VnHWC=images_VnHWC.clone())

    def _hold_for(self, step: int) -> None:
        """Have at hand what the workers read when `step` is drawn: that, and the steps that they still decode."""
        if self._held is not None:
            slices, first_step = self._slices, max(self._slices.first_step, step - self._ahead)
            numbers = slices.plan.shards_between(first_step, step, slices.rank, slices.world_size)
            self._held.hold(numbers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _DeviceCopy:
    """Copies batches to a GPU on a stream of their own, beside the kernels that were queued before."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def __call__(self, batch: PairBatch) -> PairBatch:
        """Start the copy of a batch in pinned memory; kernels that are queued from now on wait for it, the host not."""
        with torch.cuda.stream(self._stream):
            moved = batch.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for tensor in (moved.images_VnHWC, moved.labels_n):
            # It belongs to the copying stream, whose next batch could take its memory before kernels have read it.
            tensor.record_stream(computing)
        return moved


@contextmanager
def _silent_about_cores() -> Iterator[None]:
    """Leave out the DataLoader's three lines about workers and cores: `announce` says it in one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


class _StepSlices(Sampler[StepPlan]):
    """One rank's rows of step after step, drawn in the main process as the DataLoader asks for them."""

    def __init__(
        self,
        plan: Plan,
        rank: int,
        world_size: int,
        first_step: int,
        last_step: int,
        before_step: Callable[[int], None],
    ) -> None:
        pairs_per_rank(plan.global_pairs, world_size)  # refuses an uneven world size before anything starts
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.first_step, self._last_step, self._before_step = first_step, last_step, before_step
        self.next_step = first_step

    def __iter__(self) -> Iterator[StepPlan]:
        while self.next_step < self._last_step:
            self._before_step(self.next_step)
            step_plan = self.plan.step(self.next_step)
            self.next_step += 1
            yield step_plan.slice(self.rank, self.world_size)


@dataclass(frozen=True)
class _Decoded:
    """A batch as it leaves its worker: small, since the images are in shared memory already."""

    step: int
    labels_n: npt.NDArray[np.int64]
    replaced: list[str]
    images_VnHWC: Tensor | None  # noqa: N815 - dims as suffixes
    """None where they are in the step's place."""
    seeds_2n: npt.NDArray[np.uint32]
    """Augmentation seeds, those of the anchors first."""
    jpegs_2n: list[bytes] | None = None
    """Where the GPU decodes: the images' bytes, anchors first."""


class _DecodedPairs(Dataset[_Decoded | Exception]):
    """The batch of a StepPlan; runs in a worker."""

    def __init__(self, shards: ShardSet, config: DataConfig) -> None:
        self._reader, self._config = FaceReader(shards, config), config
        self._places: Tensor | None = None

    def make_places(self, num_places: int, num_pairs: int) -> None:
        """Make room for so many batches in memory that processes share.

        Raises:
            ValueError: There isn't as much of it.
        """
        places = torch.empty(num_places, *self._shape(num_pairs), dtype=torch.uint8)
        try:
            self._places = places.share_memory_()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"data.prefetch: expected {places.nbytes} bytes of shared memory for {num_places} batches"
                f" (data.workers = {self._config.workers}, data.prefetch = {self._config.prefetch}): {reason};"
                " fewer need less, and a container has as much as its --shm-size"
            ) from None

    def place_of(self, step: int) -> Tensor:
        """Return where the images of a step are, [2, n, H, W, C]."""
        assert self._places is not None
        return self._places[step % len(self._places)]

    def __getitem__(self, step_plan: StepPlan) -> _Decoded | Exception:
        try:
            return self._decode(step_plan)
        except (ValueError, OSError) as error:
            # Raised by the main process instead: the DataLoader would wrap it into a traceback of the worker.
            return error

    def _decode(self, step_plan: StepPlan) -> _Decoded:
        n, seeds_2n = len(step_plan.labels_N), step_plan.augment_seeds_N2.T.ravel()
        if self._config.decode == "gpu":
            jpegs_2n = self._reader.shards.read_all(step_plan.image_idx_N2.T.ravel())
            return _Decoded(step_plan.step, step_plan.labels_N, [], None, seeds_2n, jpegs_2n)
        own = torch.empty(self._shape(n), dtype=torch.uint8) if self._places is None else None
        pixels_VnHWC = (own if own is not None else self.place_of(step_plan.step)).numpy()
        changes = draw_augmentations(step_plan.augment_seeds_N2.ravel(), self._config)
        replaced = self._reader.pairs(step_plan.image_idx_N2, changes, pixels_VnHWC)
        return _Decoded(step_plan.step, step_plan.labels_N, replaced, own, seeds_2n)

    def _shape(self, num_pairs: int) -> tuple[int, ...]:
        side, channels = self._config.image_px, self._config.channels
        return 2, num_pairs, side, side, channels
