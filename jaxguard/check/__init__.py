"""`jaxguard check`: the command over jaxguard.Guard."""
