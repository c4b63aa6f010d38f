"""Config schemas of a training run: model, optimizer, loop, mesh, checkpoints, logging."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from jaxguard.config.base import LocalPath, NonNegative, Positive, Schema, Share


class ModelConfig(Schema):
    """The weights to train, and how to compute with them. Their shape is in the checkpoint's config.json."""

    checkpoint: LocalPath
    """A Hugging Face directory, or a repository id on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of activations and matmuls; on a CPU of the matmuls of training and of its sampling alone, and bfloat16 only where it
    has instructions for it (avx512_bf16). Guards compute in float32 there. float32 holds for matmuls too, without TF32; only a
    TPU multiplies it in bfloat16. Master weights and Adam state are always float32."""
    attention: Literal["auto", "xla", "block_sparse", "flash", "cudnn"] = "auto"
    """Attention kernel; auto takes the best that the device and the head size allow."""
    remat: Literal["full", "dots", "none"] = "full"
    """What the backward pass recomputes: every layer, all but its matmuls, or nothing."""
    query_chunk: Positive = 512
    """Query tokens whose scores attention in XLA (xla, block_sparse) holds at once."""
    loss_chunk: Positive = 256
    """Target tokens whose logits a device holds at once; a CPU keeps all for the backward pass, unless model.remat=full."""


class OptimizerConfig(Schema):
    """AdamW on a schedule."""

    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after warmup."""
    warmup_steps: NonNegative = 0
    """Steps of linear warmup."""
    final_learning_rate_share: Share = 0.0
    """Final learning rate as a share of the peak."""
    beta1: Share = 0.9
    """Adam's decay of the mean gradient."""
    beta2: Share = 0.999
    """Adam's decay of the mean squared gradient."""
    epsilon: PositiveFloat = 1e-8
    """Adam's addend to the root of the mean squared gradient."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices; norm weights are never decayed."""
    clip_norm: PositiveFloat | None = 1.0
    """Limit of the global gradient norm; null turns clipping off."""


class ObjectiveConfig(Schema):
    """What training minimizes."""

    kind: Literal["sft", "dpo", "ipo", "grpo", "gspo", "cispo"] = "sft"
    """sft: the negative log-likelihood of the answers. dpo, ipo: direct preference optimisation, on examples that have an answer to
    reject. grpo, gspo, cispo: reinforcement learning on answers that `jaxguard reinforce` samples, with a clipped ratio of each
    token, of each answer, or a capped one that only weighs."""
    beta: PositiveFloat = 0.1
    """Preferences: how strongly the model is held to the one that it starts from."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """dpo: share of the preferences that may be the wrong way round."""
    sft_weight: NonNegativeFloat = 0.0
    """Preferences: weight of the chosen answer's mean negative log-likelihood, which keeps it likely."""

    @property
    def is_preference(self) -> bool:
        return self.kind in ("dpo", "ipo")

    @property
    def is_sampled(self) -> bool:
        """Whether the answers are sampled while it trains."""
        return self.kind in ("grpo", "gspo", "cispo")


class TrainConfig(Schema):
    """The training loop."""

    objective: ObjectiveConfig = ObjectiveConfig()
    """What a step minimizes."""

    batch_size: Positive = 32
    """Examples per optimizer step."""
    epochs: PositiveFloat = 5
    """Passes over the training examples."""
    max_steps: Positive | None = None
    """Stop after this many steps; the schedule ends there too."""
    accumulation: Positive = 1
    """Micro-batches that the rows of a step are split into; the gradient does not change."""
    evaluate_every: NonNegative = 50
    """Steps between validations, which also run before the first and after the last step; 0 for only those two."""
    export: bool = True
    """Write a Hugging Face checkpoint at the end."""


class MeshConfig(Schema):
    """The device mesh, and how hosts find each other."""

    data: Positive = 1
    """Replicas of the weights."""
    fsdp: int = -1
    """Devices that a replica's weights are sharded over; -1 takes all that are left."""
    tensor: Positive = 1
    """Devices that heads, MLP units and vocabulary are sharded over."""
    hosts: Literal["single", "auto", "explicit"] = "single"
    """auto: jax.distributed detects SLURM, GKE or a TPU pod. explicit: the three fields below."""
    coordinator: str | None = None
    """host:port of process 0."""
    processes: Positive | None = None
    """Number of processes."""
    process: NonNegative | None = None
    """Index of this process, from 0."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fsdp == 0 or self.fsdp < -1:
            raise ValueError("fsdp must be positive, or -1 for all the devices that are left")
        explicit = (self.coordinator, self.processes, self.process)
        if self.hosts == "explicit" and None in explicit:
            raise ValueError("hosts: explicit needs coordinator, processes and process")
        if self.hosts != "explicit" and any(x is not None for x in explicit):
            raise ValueError(f"coordinator, processes and process go with hosts: explicit, not {self.hosts}")
        return self


class CheckpointConfig(Schema):
    """Orbax checkpoints of weights, optimizer and step."""

    every: Positive = 100
    """Steps between checkpoints; the last step is always saved."""
    keep_last: Positive = 2
    """Newest checkpoints to keep."""
    keep_best: NonNegative = 1
    """Best checkpoints by validation loss to keep besides."""


class LogConfig(Schema):
    """Trackers of the curves. metrics.jsonl is always written."""

    tensorboard: bool = True
    """Write event files to the run's folder."""
    trackio: bool = False
    """Log to trackio; install the extra of that name."""
    wandb: bool = False
    """Log to Weights & Biases; install the extra of that name."""
    project: str = "jaxguard"
    """Project name for trackio and wandb."""
    profile_step: Positive | None = None
    """Profile three steps from this one with the JAX profiler; none if the run ends before it, or resumes after them."""
