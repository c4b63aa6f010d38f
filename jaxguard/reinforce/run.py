"""Reinforcement learning on labelled prompts: the training loop, on answers that it samples."""

from jaxguard.config import Config
from jaxguard.reinforce.rollouts import Rollouts
from jaxguard.train.loop import TrainedRun, train
from jaxguard.train.run_folder import Resume


def reinforce(config: Config, resume: Resume = "auto") -> TrainedRun:
    """Train on sampled answers as `config` says, and export. Returns early, with the state saved, when a signal asks for it.

    Raises:
        JaxguardError: anything that the user can correct.
    """
    return train(config, resume, Rollouts.open)
