"""What a service tells its operators: Prometheus metrics, and an audit log that holds no text unless they ask for it."""

import hashlib
import hmac
import json
import logging
import os
import sys
from collections.abc import Mapping
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)

from jaxguard.data.examples import Example
from jaxguard.utils.errors import JaxguardError, where

AUDIT_KEY: Final = "JAXGUARD_AUDIT_KEY"
"""The environment variable with the key of the audit log's hashes; without it there are none."""
_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKENS: Final = tuple(float(2**power) for power in range(5, 18, 2))


class Metrics:
    """Metrics of one service. Labels are names of routes, policies, questions and reasons: nothing that a client writes."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        checks = ("policy", "mode", "question", "verdict")
        self.checks = Counter("jaxguard_checks", "Verdicts, of each question.", checks, registry=registry)
        self.problems = Counter("jaxguard_problems", "Checks with a problem.", ("policy", "mode"), registry=registry)
        self.rejected = Counter("jaxguard_rejected", "Requests without a verdict.", ("reason",), registry=registry)
        self.requests = Histogram(
            "jaxguard_request_seconds", "Of an HTTP request.", ("route", "status"), registry=registry, buckets=_SECONDS
        )
        self.stages = Histogram(
            "jaxguard_stage_seconds", "In the queue, in the guard.", ("stage",), registry=registry, buckets=_SECONDS
        )
        self.batch_tokens = Histogram(
            "jaxguard_batch_tokens", "Of a batch's texts, estimated.", registry=registry, buckets=_TOKENS
        )
        self.tokens = Counter("jaxguard_tokens", "Of prompts and completions.", ("kind",), registry=registry)
        self.queue_tokens = Gauge("jaxguard_queue_tokens", "Of waiting texts, estimated.", registry=registry)
        self.ready = Gauge("jaxguard_ready", "Whether /readyz says so.", registry=registry)
        self.reload_errors = Counter("jaxguard_reload_errors", "Files that were not taken over.", registry=registry)
        self.info = Info("jaxguard", "Weights and default policy.", registry=registry)


class _Handler(WatchedFileHandler):
    """Reports what cannot be written without quoting it, as Python's own handlers would."""

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger(record.name).error("a verdict was not written: %s", where(sys.exception() or RuntimeError()))


class Audit:
    """A log of verdicts as JSON lines: who asked, by which policy and weights, lengths and probabilities, no text.

    With `texts` a line is a row of a `jsonl` source, its labels null, and holds the above as `audit`.
    A file that was moved away, as logrotate does, is begun anew. With AUDIT_KEY in the environment a line has the HMAC-SHA-256 of
    the exchange, by which equal ones are found.
    """

    def __init__(self, path: Path, texts: bool = False) -> None:
        """JaxguardError: the file cannot be written."""
        self._texts = texts
        self._key = os.environ.get(AUDIT_KEY, "").encode()
        self._logger = logging.Logger("jaxguard.audit")
        try:
            self._handler = _Handler(path, encoding="utf-8")
        except OSError as error:
            raise JaxguardError(f"--audit {path}: {error.strerror or error}; name a file that can be written") from None
        self._logger.addHandler(self._handler)

    def write(self, example: Example, record: Mapping[str, Any]) -> None:
        """Append a record, with lengths of the example and its hash, or inside the example."""
        lengths = {"prompt_characters": len(example.prompt), "response_characters": len(example.response or "")}
        exchange = json.dumps([example.prompt, example.response]).encode()
        hashed = {"hmac": hmac.new(self._key, exchange, hashlib.sha256).hexdigest()} if self._key else {}
        line = {**record, **lengths, **hashed}
        self._logger.info(json.dumps({**example.to_json(), "audit": line} if self._texts else line))

    def close(self) -> None:
        self._handler.close()
