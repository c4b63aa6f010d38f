"""AdamW and its schedule, from the config."""

import optax

from jaxguard.config.train import OptimizerConfig
from jaxguard.models.spec import Spec
from jaxguard.models.weights import table


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step: linear warmup, then decay to the final share at `steps`."""
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate_share
    decay_steps = max(1, steps - config.warmup_steps)
    match config.schedule:
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_learning_rate_share)
        case "linear":
            decay = optax.linear_schedule(peak, final, decay_steps)
        case "constant":
            decay = optax.constant_schedule(peak)
    # The first step of the warmup has 1 / (warmup + 1) of the peak, not 0.
    warmup = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, max(1, config.warmup_steps))
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def optimizer(config: OptimizerConfig, spec: Spec, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam in float32, decoupled decay of matrices only, schedule."""
    decayed = {w.path: "norm" not in w.axes for w in table(spec)}
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decayed) if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )
