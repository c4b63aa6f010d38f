"""Runs the study of the working directory with the stub for every stage, as a process that can be killed."""

import sys

from jaxguard.study import run
from jaxguard.study.__main__ import main

run.ENTRY = (sys.argv[1],)
sys.exit(main(["run", "study.yaml"]))
