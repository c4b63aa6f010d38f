"""Plan a run without its hardware, as jaxguard.plan("gemma4b_5k", ["a100-80gb:8"]) does. See also run.search, sweeps.sweep."""
