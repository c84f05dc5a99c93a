"""Every setting of a run: frozen dataclasses, one per section. A section is passed to what needs no more than it."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and how it starts."""

    dir: str = "runs/facetrain"
    """The run folder: config, metrics, weights, checkpoints, figures."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: continue an unfinished run of the same config; never: refuse a folder in use; must: refuse a fresh one."""
    seed: int = 0
    """Seed of weights, plan, augmentation and mining."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    timeout_s: float = 600.0
    """Seconds after which a collective whose peer is gone fails."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        _at_least("run.seed", self.seed, 0)
        if self.timeout_s <= 0:
            raise ValueError(f"run.timeout_s: expected more than 0 seconds, got {self.timeout_s}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, and what happens to them before the network."""

    shards: str = "shards"
    """Folder made by `facetrain pack`."""
    shard_px: int = 112
    """Side of the square images in the shards, in pixels; checked against their manifest."""
    crop_px: int | None = None
    """Side of the centre crop taken from a shard image, in shard pixels; null takes the whole image."""
    image_px: int = 112
    """Side of the network's input, in pixels; the crop is resized to it."""
    colour: Literal["rgb", "grey"] = "rgb"
    """Channels of the network's input."""
    mirror: bool = True
    """Augmentation: mirror half of the images."""
    crop_jitter_px: int = 0
    """Augmentation: the crop moves by up to this many shard pixels along each axis."""
    colour_jitter: float = 0.0
    """Augmentation: brightness and contrast each change by a factor in 1 -/+ this fraction, in [0, 1)."""
    holdout_identities: int = 0
    """Identities, drawn by the seed, that are never trained on and give the held-out pairs."""
    exclude: tuple[str, ...] = ()
    """Names of identities that are left out of training, such as people who are also in the test set."""
    workers: int = 1
    """Decoding processes per rank; 0 decodes in the training process."""
    prefetch: int = 4
    """Batches that each worker holds ready."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        for name in ("shard_px", "image_px", "prefetch"):
            _at_least(f"data.{name}", getattr(self, name), 1)
        for name in ("crop_jitter_px", "holdout_identities", "workers"):
            _at_least(f"data.{name}", getattr(self, name), 0)
        if self.crop_px is not None and not 1 <= self.crop_px <= self.shard_px:
            raise ValueError(f"data.crop_px: expected 1 to data.shard_px ({self.shard_px}), got {self.crop_px}")
        if not 0 <= self.colour_jitter < 1:
            raise ValueError(f"data.colour_jitter: expected a fraction in [0, 1), got {self.colour_jitter}")

    @property
    def channels(self) -> int:
        """Channels of the network's input."""
        return 3 if self.colour == "rgb" else 1


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The backbone that turns a face into an embedding."""

    name: str = "casianet"
    """casianet, iresnet18, iresnet50, iresnet100, or torchvision:NAME with its classifier removed."""
    embedding_dim: int | None = None
    """Width of the embedding; null keeps the backbone's own, a number adds a linear layer to that width."""
    norm: Literal["batch", "group", "none"] = "batch"
    """Normalisation in casianet and iresnet; networks without batch statistics are exactly the same on any ranks."""
    sync_batchnorm: bool = False
    """Batch statistics over the images of all ranks instead of each rank's own."""
    imagenet_weights: str | None = None
    """Local file with torchvision's ImageNet weights, for torchvision:NAME."""
    init_from: str | None = None
    """Run folder or .safetensors file whose weights a new run starts from; layers that don't fit are named."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.embedding_dim is not None:
            _at_least("model.embedding_dim", self.embedding_dim, 1)
        if self.imagenet_weights is not None and not self.name.startswith("torchvision:"):
            raise ValueError(f"model.imagenet_weights: only for torchvision:NAME, model.name is '{self.name}'")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective."""

    name: Literal["npair-mc", "npair-ovo", "tuplet"] = "npair-mc"
    """npair-mc: the multi-class N-pair loss (Sohn, NeurIPS 2016); npair-ovo: one against one; tuplet: other anchors."""
    l2_weight: float = 0.002
    """Weight of the penalty mean ||f||^2 over all 2N embeddings."""
    symmetric: bool = False
    """npair-mc: the mean of anchors against all positives and of positives against all anchors."""
    temperature: float | None = None
    """A number: cosines divided by it take the place of inner products; null: embeddings aren't normalised."""
    reduce_precision: Literal["float32", "bfloat16"] = "float32"
    """In which gradients of gathered embeddings are summed over ranks; bfloat16: half the bytes, 0.05% error."""
    tile_bytes: int = 1 << 25
    """Memory for logits at a time, in bytes: the n x N of a rank are made in tiles of rows, twice a step."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        if self.l2_weight < 0:
            raise ValueError(f"loss.l2_weight: expected 0 or more, got {self.l2_weight}")
        if self.symmetric and self.name != "npair-mc":
            raise ValueError(f"loss.symmetric: goes with loss.name=npair-mc, got '{self.name}'")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"loss.temperature: expected more than 0, or null, got {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """Which hard negative classes share a batch (Sohn 2016, section 3)."""

    mode: Literal["off", "auto", "gathered", "table", "quota"] = "off"
    """off: random classes; gathered: greedy over candidates embedded by all ranks; table: over the embeddings of recent
    training steps; quota: as gathered, with as many classes of each virtual node; auto chooses and says why."""
    candidates: int = 10_000
    """Classes drawn and embedded per round; all where there are fewer."""
    images_per_class: Literal[1, 2] = 2
    """Images embedded per candidate; with one, a class is scored by its anchor alone, at half the cost of a round."""
    candidates_per_batch: float = 0.5
    """Fraction of a round's candidates that each batch is mined from, drawn afresh per batch, so that lists differ."""
    batches_per_round: int = 32
    """Batches that one round of embedding serves."""
    warmup_steps: int = 0
    """Steps with random classes before the first round; mining an untrained network gains nothing."""
    lag_steps: int = 8
    """Steps between a round and the first batch that uses it; at least data.workers * data.prefetch."""
    random_share: float = 0.0
    """Fraction of a mined batch that is filled with random classes instead, against label noise."""
    similarity_cap: float | None = None
    """Classes of a higher cosine to a chosen class stay out of its batch: the same person twice, or wrong labels."""
    max_appearances: int | None = None
    """Batches of a round that an identity may stand in; in further ones a random identity takes its place."""
    hinge: bool = False
    """Clip violations at 0 from below: classes that don't violate the margin then tie and are drawn by the seed."""
    margin: float = 0.0
    """Margin of the hinge, in units of the inner product."""
    table_max_age_steps: int = 2000
    """mode=table: embeddings of a class that was trained on longer ago than this are left out."""
    table_refresh_share: float = 0.25
    """mode=table: up to this fraction of a batch are random classes of those left out, which refreshes them."""
    table_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """mode=table: how embeddings are kept, two of each class, over the memory of all ranks."""
    table_neighbours: int = 64
    """mode=table: neighbours of each class in the graph that batches are mined on."""
    table_exact_limit: int = 200_000
    """mode=table: classes up to which mining is exact, by all products; beyond, FAISS approximates on the CPU."""
    table_probes: int = 8
    """mode=table: clusters, of 4 sqrt(classes), that the approximation looks into; more find more and take longer."""
    virtual_nodes: int = 8
    """mode=quota: parts of the identities that give each batch as many classes; a divisor of train.global_pairs and a
    multiple of the processes."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        _at_least("mining.candidates", self.candidates, 2)
        _at_least("mining.batches_per_round", self.batches_per_round, 1)
        _at_least("mining.warmup_steps", self.warmup_steps, 0)
        _at_least("mining.lag_steps", self.lag_steps, 0)
        if self.margin and not self.hinge:
            raise ValueError(f"mining.margin: goes with mining.hinge=true, got {self.margin} without it")
        if not 0 < self.candidates_per_batch <= 1:
            raise ValueError(
                f"mining.candidates_per_batch: expected a fraction in (0, 1], got {self.candidates_per_batch}"
            )
        if not 0 <= self.random_share < 1:
            raise ValueError(f"mining.random_share: expected a fraction in [0, 1), got {self.random_share}")
        for name in ("table_neighbours", "table_exact_limit", "table_probes", "virtual_nodes"):
            _at_least(f"mining.{name}", getattr(self, name), 1)
        _at_least("mining.table_max_age_steps", self.table_max_age_steps, 2)
        if not 0 <= self.table_refresh_share < 1:
            raise ValueError(
                f"mining.table_refresh_share: expected a fraction in [0, 1), got {self.table_refresh_share}"
            )
        if self.similarity_cap is not None and not 0 < self.similarity_cap <= 1:
            raise ValueError(f"mining.similarity_cap: expected a cosine in (0, 1], got {self.similarity_cap}")
        if self.max_appearances is not None:
            _at_least("mining.max_appearances", self.max_appearances, 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimization."""

    global_pairs: int = 128
    """N: pairs of the global batch, each of another identity; pairs per rank are N / world size."""
    micro_pairs: int | None = None
    """Pairs per forward, a divisor of N / world size: less memory for one more forward (GradCache); null: all."""
    overlap: bool = False
    """Gather positives while anchors are embedded, in two forwards; for networks without batch statistics."""
    steps: int = 1000
    """Optimizer steps of the whole run; 0 evaluates the untrained network."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """sgd has momentum."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 0.0
    """Weight decay of weight matrices and kernels; biases and normalisation have none."""
    schedule: Literal["constant", "step", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    drop_steps: tuple[int, ...] = ()
    """schedule=step: the steps at which the learning rate is multiplied by drop_factor."""
    drop_factor: float = 0.1
    """schedule=step: the factor of each drop."""
    clip_norm: float = 0.0
    """Largest norm of the averaged gradient of the whole objective; 0 is no clipping."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast forward; weights, statistics, loss and optimizer stay float32."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too are sharded over the ranks."""
    log_every_steps: int = 20
    """Steps between log lines and metrics."""
    save_every_steps: int = 500
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, besides the best."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        _at_least("train.global_pairs", self.global_pairs, 2)
        for name in ("log_every_steps", "save_every_steps", "keep_checkpoints"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        _at_least("train.steps", self.steps, 0)
        _at_least("train.warmup_steps", self.warmup_steps, 0)
        if self.micro_pairs is not None:
            _at_least("train.micro_pairs", self.micro_pairs, 1)
        if self.learning_rate <= 0:
            raise ValueError(f"train.learning_rate: expected more than 0, got {self.learning_rate}")
        for name in ("weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}: expected 0 (off) or more, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"train.momentum: expected a fraction in [0, 1), got {self.momentum}")
        if not 0 < self.drop_factor < 1:
            raise ValueError(f"train.drop_factor: expected a fraction in (0, 1), got {self.drop_factor}")
        if (self.schedule == "step") != bool(self.drop_steps):
            raise ValueError(
                f"train.drop_steps: goes with train.schedule=step, got {list(self.drop_steps)} with '{self.schedule}'"
            )
        if list(self.drop_steps) != sorted(set(self.drop_steps)):
            raise ValueError(f"train.drop_steps: expected rising steps, got {list(self.drop_steps)}")


_MORE_IS_BETTER = ("accuracy", "auc", "vr_at_far_1e-2", "vr_at_far_1e-3", "rank1", "rank5", "dir_rank1_at_far_1e-2")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What a run is judged on while it trains and at its end."""

    every_steps: int = 0
    """Steps between evaluations; 0 evaluates at the end alone."""
    at_start: bool = False
    """Evaluate the untrained network too, as step 0."""
    dataset: str = "lfw"
    """Name of the evaluation set in metrics and results; with 'lfw' its published counts are checked."""
    images: tuple[str, ...] = ()
    """Evaluation images: a folder of Name/Name_0001.jpg, or tars of it; none evaluates on held-out identities alone."""
    pairs: str | None = None
    """Verification pairs, in the form of LFW's pairs.txt."""
    view1: tuple[str, ...] = ()
    """LFW's View 1, pairsDevTrain.txt and pairsDevTest.txt: a set to choose models by."""
    open_set_people: str | None = None
    """List of the people of open-best-rowden, one name a line."""
    mirror: bool = True
    """Add the embedding of the mirrored image."""
    draws: int = 1
    """Seeded draws of the held-out probes of open-best-rowden; 1 takes the lowest-numbered image."""
    best_metric: str = "heldout/accuracy"
    """Metric, more being better, by which the best checkpoint is chosen, such as lfw/view1/accuracy."""

    def __post_init__(self) -> None:
        """Check the bounds."""
        _at_least("eval.every_steps", self.every_steps, 0)
        _at_least("eval.draws", self.draws, 1)
        if self.images and self.pairs is None and not self.view1:
            raise ValueError("eval.pairs: expected a pairs file, since eval.images is given")
        for name in ("pairs", "view1", "open_set_people"):
            if getattr(self, name) and not self.images:
                raise ValueError(f"eval.{name}: goes with eval.images, which is empty")
        if len(self.view1) not in (0, 2):
            raise ValueError(f"eval.view1: expected pairsDevTrain.txt and pairsDevTest.txt, got {list(self.view1)}")
        self._check_best_metric()

    @property
    def chooses_on_test(self) -> bool:
        """Whether the best checkpoint is chosen by what LFW is published on, which makes its figure optimistic."""
        return self.best_metric.startswith("lfw/") and not self.best_metric.startswith("lfw/view1/")

    def _check_best_metric(self) -> None:
        parts, what = self.best_metric.split("/"), f"eval.best_metric: '{self.best_metric}'"
        if parts[0] not in ("heldout", self.dataset) or parts[-1] not in _MORE_IS_BETTER:
            expected = f"heldout/FIGURE or {self.dataset}/PROTOCOL/FIGURE, of {', '.join(_MORE_IS_BETTER)}"
            raise ValueError(f"{what}, expected {expected}")
        if parts[0] != "heldout" and not (self.images and (self.view1 or parts[1] != "view1")):
            raise ValueError(f"{what} needs eval.images{' and eval.view1' if parts[1] == 'view1' else ''}")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl in the run folder."""

    backend: Literal["mlflow", "none"] = "mlflow"
    """mlflow writes to MLFLOW_TRACKING_URI, or to sqlite:///mlflow.db where that is unset."""
    experiment: str = "facetrain"
    """MLflow experiment."""
    run_name: str | None = None
    """MLflow run name; null takes the name of the run folder."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        """Check what concerns two sections."""
        if self.train.overlap:
            self._check_overlap()
        row_bytes = 4 * self.train.global_pairs
        if self.loss.tile_bytes < row_bytes:
            raise ValueError(
                f"loss.tile_bytes: expected at least the {row_bytes} bytes of a row of train.global_pairs ="
                f" {self.train.global_pairs} scores, got {self.loss.tile_bytes}"
            )
        if self.mining.mode in ("gathered", "quota") and self.mining.candidates < self.train.global_pairs:
            raise ValueError(
                f"mining.candidates: expected at least train.global_pairs = {self.train.global_pairs} classes to"
                f" choose from, got {self.mining.candidates}"
            )
        if self.mining.mode == "quota" and self.train.global_pairs % self.mining.virtual_nodes:
            raise ValueError(
                f"mining.virtual_nodes: expected a divisor of train.global_pairs = {self.train.global_pairs}, got"
                f" {self.mining.virtual_nodes}"
            )
        ahead = self.data.workers * self.data.prefetch
        if self.mining.mode != "off" and self.mining.lag_steps < ahead:
            raise ValueError(
                f"mining.lag_steps: expected at least data.workers * data.prefetch = {ahead}, so that no batch is"
                f" read before it is mined, got {self.mining.lag_steps}"
            )

    def _check_overlap(self) -> None:
        if self.model.norm == "batch" or self.model.name.startswith("torchvision:"):
            raise ValueError(
                f"train.overlap: anchors and positives would have batch statistics of their own; expected model.norm"
                f" group or none, got '{self.model.norm}' with '{self.model.name}'"
            )
        if self.train.micro_pairs is not None:
            raise ValueError(f"train.overlap: goes with train.micro_pairs null, got {self.train.micro_pairs}")
        if self.loss.name == "tuplet":
            raise ValueError("train.overlap: goes with loss.name npair-mc or npair-ovo, got 'tuplet'")

    def flat(self) -> dict[str, Any]:
        """Return every setting under its dotted key."""
        return {
            f"{section.name}.{key.name}": getattr(getattr(self, section.name), key.name)
            for section in fields(self)
            for key in fields(getattr(self, section.name))
        }


def _at_least(key: str, value: int, bound: int) -> None:
    if value < bound:
        raise ValueError(f"{key}: expected {bound} or more, got {value}")
