"""Which identities and which images make the batch of a step: a pure function of seed, step and mined lists.

Dims: I identities that are trained on, N global pairs, K images of an identity in a batch, P = 2 N / K identities of
it, B mined batches.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from facetrain.data.index import ClassTable

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StepPlan:
    """The pairs of one step, of all ranks or of one."""

    step: int
    """The optimizer step, from 0."""
    labels_N: Ints  # noqa: N815 - dims as suffixes
    """Identities, as rows of the class table; each stands in K / 2 rows, one after another."""
    image_idx_N2: Ints  # noqa: N815
    """Global image numbers of anchor and positive; no image stands twice in the step."""
    augment_seeds_N2: npt.NDArray[np.uint32]  # noqa: N815
    """One augmentation seed per image."""

    def slice(self, rank: int, world_size: int) -> "StepPlan":
        """Return the rows of one rank: n = N / W rows from rank * n."""
        n = pairs_per_rank(len(self.labels_N), world_size)
        rows = np.s_[rank * n : (rank + 1) * n]
        return StepPlan(self.step, self.labels_N[rows], self.image_idx_N2[rows], self.augment_seeds_N2[rows])


class Plan:
    """The stream of batches.

    Without mining it is one endless stream of permutations of the identities, cut into batches of P. An identity that
    would stand twice in the batch that spans two permutations swaps places with the next one that doesn't, so that
    each permutation still holds every identity once. A mined batch takes the place of the random batch of its step,
    which is then not drawn. Nothing depends on the number of ranks.
    """

    def __init__(
        self, table: ClassTable, identities: Ints, *, global_pairs: int, seed: int, images_per_identity: int = 2
    ) -> None:
        """Plan batches of `global_pairs` pairs.

        Args:
            table: The identities and images of the shards.
            identities: Rows of the table that are trained on, each with K or more images.
            global_pairs: N.
            seed: 0 or more.
            images_per_identity: K, an even number; K / 2 divides N.

        Raises:
            ValueError: There are fewer identities than a batch takes.
        """
        self.identities_per_batch = 2 * global_pairs // images_per_identity
        """P."""
        if self.identities_per_batch > len(identities):
            if images_per_identity > 2:
                raise ValueError(
                    f"train.images_per_identity: {self.identities_per_batch} identities with {images_per_identity}"
                    f" images each make train.global_pairs = {global_pairs} pairs, but only {len(identities)} that are"
                    " trained on have as many images"
                )
            raise ValueError(
                f"train.global_pairs: expected at most the {len(identities)} identities that are trained on,"
                f" since each stands once in a batch, got {global_pairs}; lower it"
            )
        self.images_per_identity = images_per_identity
        self.table = table
        self.identities_I = np.asarray(identities, dtype=np.int64)
        self.global_pairs = global_pairs
        self.seed = seed
        self._first_image = np.asarray(table.first_image)  # a plain array, where the table maps a file into memory
        self._trained = np.zeros(table.num_identities, dtype=np.bool_)
        self._trained[self.identities_I] = True
        self._permutations: dict[int, Ints] = {}
        self._mined: dict[int, Ints] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which the random stream passes every identity, ceil(I / P)."""
        return -(-len(self.identities_I) // self.identities_per_batch)

    def describe(self) -> str:
        """Return how often identities are drawn, in words, for the log."""
        images = f", with {self.images_per_identity} images at a time" if self.images_per_identity > 2 else ""
        return f"an identity is drawn every {len(self.identities_I) / self.identities_per_batch:.2f} steps{images}"

    def shards_between(self, first_step: int, last_step: int, rank: int, world_size: int) -> set[int]:
        """Return the shards that a rank needs for these steps, both included; empty: any of them."""
        return set()

    def pools(self, first_step: int, last_step: int) -> list[Ints] | None:
        """Return what mining may choose from for these steps, both included: [V], for each V-th of a batch's rows.

        None: any identity, for any row.
        """
        return None

    def step(self, step: int) -> StepPlan:
        """Return the batch of any step, all ranks together."""
        labels_P = self._mined.get(step)
        if labels_P is None:
            labels_P = self._random_labels(step)
        labels_N = labels_P.repeat(self.images_per_identity // 2)
        rng = np.random.default_rng([self.seed, _IMAGES, step])
        augment_seeds_N2 = rng.integers(0, 1 << 32, size=(self.global_pairs, 2), dtype=np.uint32)
        if self.images_per_identity > 2:
            return StepPlan(step, labels_N, self._distinct_images(labels_P, rng).reshape(-1, 2), augment_seeds_N2)
        first_N = self._first_image[labels_N]
        num_images_N = self._first_image[labels_N + 1] - first_N
        anchor_N = rng.integers(0, num_images_N)
        # A distance of 1 to count - 1 around the circle of the identity's images: never the anchor, all others alike.
        positive_N = (anchor_N + rng.integers(1, num_images_N)) % num_images_N
        image_idx_N2 = first_N[:, None] + np.stack([anchor_N, positive_N], axis=1)
        return StepPlan(step, labels_N, image_idx_N2, augment_seeds_N2)

    def _distinct_images(self, labels_P: Ints, rng: np.random.Generator) -> Ints:
        """Draw K distinct images of each identity, [P, K]: those with the smallest of as many random numbers."""
        first_P = self._first_image[labels_P]
        num_images_P = self._first_image[labels_P + 1] - first_P
        keys = rng.random((len(labels_P), int(num_images_P.max())))
        keys[np.arange(keys.shape[1]) >= num_images_P[:, None]] = 1.0
        order: Ints = np.argsort(keys, axis=1, kind="stable")
        return first_P[:, None] + order[:, : self.images_per_identity]

    def add_mined(self, first_step: int, identities_BN: Ints) -> None:
        """Let mined identities make the batches of steps first_step to first_step + B - 1.

        Every rank adds the same lists, before any rank's loader draws the first of these steps: see
        `PairLoader.first_undrawn_step`.

        Raises:
            ValueError: A list has another length than N, names an identity twice, or names one that isn't trained on
                or has one image.
        """
        identities_BN = np.array(identities_BN, dtype=np.int64)
        if identities_BN.ndim != 2 or identities_BN.shape[1] != self.identities_per_batch:
            shape = list(identities_BN.shape)
            raise ValueError(f"mined lists: expected [batches, {self.identities_per_batch}], got {shape}")
        in_table = (identities_BN >= 0) & (identities_BN < self.table.num_identities)
        known = identities_BN[in_table]
        lone = known[self._first_image[known + 1] - self._first_image[known] < 2]
        if len(lone):
            raise ValueError(
                f"mined lists of steps from {first_step}: name '{self.table.names[lone[0]]}', which has one image;"
                " expected identities with two or more, since a pair takes two"
            )
        if not (in_table.all() and self._trained[identities_BN].all()):
            raise ValueError(f"mined lists of steps from {first_step}: name an identity that isn't trained on")
        ordered = np.sort(identities_BN, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ValueError(f"mined lists of steps from {first_step}: name an identity twice in a batch")
        self._mined.update(zip(range(first_step, first_step + len(identities_BN)), identities_BN, strict=True))

    def pending(self, from_step: int) -> dict[int, Ints]:
        """Return the mined lists of from_step and later, by step; `add_mined(step, [list])` restores each."""
        return {step: labels_N for step, labels_N in sorted(self._mined.items()) if step >= from_step}

    def forget_before(self, step: int) -> None:
        """Free the mined lists of steps that have been trained."""
        self._mined = self.pending(step)

    def _random_labels(self, step: int) -> Ints:
        """Cut one batch from the stream; it spans two permutations at most, since P <= I."""
        start = step * self.identities_per_batch
        epoch, offset = divmod(start, len(self.identities_I))
        labels_P = self._permutation(epoch)[offset : offset + self.identities_per_batch]
        if len(labels_P) < self.identities_per_batch:
            head = self._permutation(epoch + 1)[: self.identities_per_batch - len(labels_P)]
            labels_P = np.concatenate([labels_P, head])
        return labels_P.copy()

    def _permutation(self, epoch: int) -> Ints:
        """Return the identities in the order of an epoch, without repeats in the batch that began one epoch earlier."""
        first = epoch
        while first not in self._permutations and self._needs_earlier(first):
            first -= 1
        for e in range(first, epoch + 1):
            if e not in self._permutations:
                self._permutations[e] = self._without_repeats(e)
                if len(self._permutations) > max(3, _KEPT_ENTRIES // len(self.identities_I)):
                    del self._permutations[next(iter(self._permutations))]
        return self._permutations[epoch]

    def _carried(self, epoch: int) -> int:
        """Return how many identities of the batch that spans the start of an epoch come from the epoch before."""
        return epoch * len(self.identities_I) % self.identities_per_batch

    def _needs_earlier(self, epoch: int) -> bool:
        """Return whether the swaps in the epoch before can reach its tail: they stay within its first P places."""
        return self._carried(epoch) > 0 and len(self.identities_I) < 2 * self.identities_per_batch

    def _without_repeats(self, epoch: int) -> Ints:
        permutation = self._shuffled(epoch)
        carried = self._carried(epoch)
        if carried == 0:
            return permutation
        before = self._permutations.get(epoch - 1)
        tail = (before if before is not None else self._shuffled(epoch - 1))[-carried:]
        repeated = np.isin(permutation[: self.identities_per_batch], tail)
        wrong = np.flatnonzero(repeated[: self.identities_per_batch - carried])
        # The places after the batch: as many as were carried over, so that there are always enough without a repeat.
        spare = (
            self.identities_per_batch
            - carried
            + np.flatnonzero(~repeated[self.identities_per_batch - carried :])[: len(wrong)]
        )
        permutation[wrong], permutation[spare] = permutation[spare], permutation[wrong]
        return permutation

    def _shuffled(self, epoch: int) -> Ints:
        return np.random.default_rng([self.seed, _ORDER, epoch]).permutation(self.identities_I)


def pairs_per_rank(global_pairs: int, world_size: int) -> int:
    """Return n = N / W.

    Raises:
        ValueError: W doesn't divide N; every rank must hold as many pairs as the others, or the mean gradient is off.
    """
    if global_pairs % world_size:
        raise ValueError(f"train.global_pairs: expected a multiple of the {world_size} processes, got {global_pairs}")
    return global_pairs // world_size


def count_draws(draws: Ints, step_plan: StepPlan) -> None:
    """Add a step's draws to `draws`, int64, one count per row of the class table, in place."""
    draws[step_plan.labels_N] += 1


# Streams of random numbers that share the run's seed.
_ORDER, _IMAGES = 1, 2
# Permutations are kept up to 32 MiB, so that sets of few identities, with many epochs in flight, don't redo them.
_KEPT_ENTRIES = 1 << 22
