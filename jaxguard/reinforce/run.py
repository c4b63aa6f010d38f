"""Reinforcement learning on labelled prompts: the training loop, on answers that it samples."""

from jaxguard.config import Config
from jaxguard.reinforce.page import write_rollouts_page
from jaxguard.reinforce.rollouts import Rollouts
from jaxguard.train.loop import TrainedRun, train
from jaxguard.train.run_folder import Resume


def reinforce(config: Config, resume: Resume = "auto") -> TrainedRun:
    """Train on sampled answers as `config` says, export, and write the page rollouts.html.

    Returns early, with the state saved and the page of what there is, when a signal asks for it.

    Raises:
        JaxguardError: anything that the user can correct.
    """
    run = train(config, resume, Rollouts.open)
    write_rollouts_page(run.folder, config.name)
    return run
