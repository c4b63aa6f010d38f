"""The processes of a run, one on each host: how they find each other, and how one that fails ends the others."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import jax

from jaxguard.cli import exit_code
from jaxguard.config.train import MeshConfig
from jaxguard.utils.errors import JaxguardError

Result = TypeVar("Result")

START_TIMEOUT = 300
"""Seconds in which all processes of a run must have started."""

NO_ALL_REDUCE_COMBINER = "--xla_disable_hlo_passes=cpu-all-reduce-combiner"
"""For XLA_FLAGS. A CPU's all-reduce of several arrays continues with the next array when one has failed because a process
has died: processes that are still at the one before then wait for 100 seconds, or Gloo aborts them (jaxlib 0.10.2)."""


def start_hosts(config: MeshConfig) -> None:
    """Join the other hosts of the job, before anything else uses JAX's devices.

    When the others do not come, JAX ends the process with a message of its own; so this prints first what it waits for.

    Raises:
        JaxguardError: jax.distributed could not be initialized.
    """
    if config.hosts == "single" or jax.distributed.is_initialized():
        return
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NO_ALL_REDUCE_COMBINER}"
    sys.stderr.write(f"mesh.hosts={config.hosts}: waiting up to {START_TIMEOUT} s for all processes of the run\n")
    try:
        explicit = config.hosts == "explicit"
        others = (config.coordinator, config.processes, config.process) if explicit else ()
        jax.distributed.initialize(*others, initialization_timeout=START_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise JaxguardError(
            f"mesh.hosts={config.hosts}: jax.distributed could not start: {error}; under SLURM, GKE or on a TPU pod use "
            "mesh.hosts=auto, elsewhere mesh.hosts=explicit with mesh.coordinator, mesh.processes and mesh.process"
        ) from error


def end_together(run: Callable[[], Result]) -> Result:
    """Return what `run` returns; when it fails on one of several hosts, print why and end this process at once.

    The usual exit waits for the other processes, and they wait for this one, in a collective; or one of them has died, and
    this process waits for it. A process that has exited makes the collectives and the heartbeat of the others fail, so they
    end too: all within JAX's 100 seconds.
    """
    try:
        return run()
    except BaseException as error:
        if not jax.distributed.is_initialized() or jax.process_count() == 1:
            raise
        text, problem = "".join(traceback.format_exception(error)), error

        def raise_again() -> None:
            raise problem

        try:
            code = exit_code(raise_again)  # prints what the CLI knows
        except Exception:
            code = 1
            sys.stderr.write(
                f"{text}error: process {jax.process_index()} of {jax.process_count()} stops, for the reason above. "
                "If a collective could not reach the others, another process of this run has died: its own output says why. "
                "Restart all of them: the run resumes from its last checkpoint\n"
            )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
