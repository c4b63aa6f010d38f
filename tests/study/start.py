"""Runs the study of the working directory with the stub for every stage, as a process that can be killed."""

import sys

from jaxguard.study import stages
from jaxguard.study.__main__ import main

stages.COMMANDS = {stage: (sys.argv[1], stage) for stage in stages.COMMANDS}
sys.exit(main(["run", "study.yaml"]))
