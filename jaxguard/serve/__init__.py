"""`jaxguard serve`: a guard behind an HTTP API."""
