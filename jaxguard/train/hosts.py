"""The processes of a run, one on each host: how they find each other, and how none of them waits for one that is gone."""

import os
import sys
import traceback
from collections.abc import Callable

import jax

from jaxguard.cli import exit_code
from jaxguard.config.train import MeshConfig
from jaxguard.utils.errors import JaxguardError

PATIENCE = 300
"""Seconds in which all processes of a run must have started."""

ONE_BY_ONE = "--xla_disable_hlo_passes=cpu-all-reduce-combiner"
"""For XLA_FLAGS. A CPU's all-reduce of several arrays goes on to the next array when one has failed because a process
has died: those that are still at the one before then wait for 100 seconds, or Gloo aborts them (jaxlib 0.10.2)."""


def start_hosts(config: MeshConfig) -> None:
    """Join the other hosts of the job; must come before anything else asks JAX for its devices.

    JAX itself ends the process, with words of its own, when the others do not come; so it says first what it waits for.

    Raises:
        JaxguardError: the environment does not say who the others are, or their answer makes no sense.
    """
    if config.hosts == "single" or jax.distributed.is_initialized():
        return
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_BY_ONE}"
    sys.stderr.write(f"mesh.hosts={config.hosts}: waits up to {PATIENCE} s for all processes of the run to be there\n")
    try:
        if config.hosts == "explicit":
            jax.distributed.initialize(
                config.coordinator, config.processes, config.process, initialization_timeout=PATIENCE
            )
        else:
            jax.distributed.initialize(initialization_timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise JaxguardError(
            f"mesh.hosts={config.hosts}: jax.distributed could not start: {error}; under SLURM, GKE or on a TPU pod use "
            "mesh.hosts=auto, elsewhere mesh.hosts=explicit with mesh.coordinator, mesh.processes and mesh.process"
        ) from error


def end_together(run: Callable[[], int]) -> int:
    """What `run` returns; when it fails on one of several hosts, say why and end this process there and then.

    The usual way out waits for the other processes, and they wait for this one, in a collective; or one of them has
    died, and this process waits for it. A process that is gone makes the collectives and the heartbeat of the others
    fail, so they end too: all within JAX's 100 seconds.
    """
    try:
        return run()
    except BaseException as error:
        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            raise
        code = _tell(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell(error: BaseException) -> int:
    """Show an error as the door would; the exit code."""
    lines = traceback.format_exception(error)

    def again() -> None:
        raise error

    try:
        return exit_code(again)
    except Exception:  # none that the door knows
        sys.stderr.write(
            f"{''.join(lines)}error: process {jax.process_index()} of {jax.process_count()} stops, for the reason above. "
            "If a collective could not reach the others, another process of this run has died: its own output says why. "
            "Start all of them again: the run goes on from its last checkpoint\n"
        )
        return 1
