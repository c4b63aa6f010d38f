"""`jaxguard serve --model RUN|EXPORT|URL --policy NAME`: answer checks of a guard over HTTP."""

import argparse
import asyncio
import gc
import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from jaxguard.cli import Command, suggest
from jaxguard.config.base import CONFIG_FOLDER, names
from jaxguard.config.evaluate import EvaluateConfig
from jaxguard.guards.modes import MODES
from jaxguard.utils.errors import JaxguardError, where
from jaxguard.utils.terminal import Console
from jaxguard.utils.versions import install

if TYPE_CHECKING:
    from jaxguard.guards.guard import Guard

MOST_CONNECTIONS = 2048

DESCRIPTION = """\
Serve a guard over HTTP. POST /v1/check takes {"prompt": …, "response": …} and answers verdict, probabilities and versions;
/v1/checks takes several, /v1/check/stream a response that is still written; GET /v1/policies, /v1/models, /healthz, /readyz
and /metrics say how it is, /openapi.json describes the rest. An answer with status 200 is a verdict of the guard; whatever
prevents one is an error, never a pass.

examples:
  jaxguard serve --model runs/gemma4b_dual_5k --policy aegis2 --mode direct
  jaxguard serve --model http://127.0.0.1:30000 --policies my/policies --keys my/keys.yaml --host 0.0.0.0 --audit audit.jsonl
"""
EPILOG = """\
Requests may name the policy of --policy, or one in --policies by its file's name, and no other. Files of policies and keys are read
again every 10 s and at SIGHUP; one that is malformed is reported and leaves the old version. SIGTERM ends the service after what is
under way was answered. docs/service.md has the API, the keys' file and what each failure looks like.

policies in configs/policies/: {policies}
"""


def _serve(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise JaxguardError(f"jaxguard serve needs FastAPI and uvicorn: {install('serve')}")
    from jaxguard.guards.guard import Guard  # loads transformers

    if options.audit_texts and options.audit is None:
        raise JaxguardError("--audit-texts needs --audit FILE")
    folder = None if options.policies is None else Path(options.policies)
    policy = options.policy
    if policy is not None and folder is not None and (folder / f"{policy}.yaml").is_file():
        policy = str(folder / f"{policy}.yaml")
    choices = (policy, options.mode, options.tokenizer, options.config, options.operating_point)
    with _bind(options.host, options.port) as listener:
        guard = Guard.load(options.model, *choices, deadline=options.timeout)
        if guard.warning:
            Console(stderr=True).print(Text(f"note: {guard.warning}", style="yellow"))
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        closing = threading.Thread(target=guard.close, daemon=True)
        try:
            asyncio.run(_run(options, guard, policy, folder, listener))
        finally:
            closing.start()
            closing.join(options.drain)
    if closing.is_alive():
        logging.warning("the guard still computes what nobody waits for: it is left behind")
        logging.shutdown()
        os._exit(0)
    return 0


async def _run(
    options: argparse.Namespace, guard: "Guard", policy: str | None, folder: Path | None, listener: socket.socket
) -> None:
    """Serve until a signal ends it."""
    import uvicorn

    from jaxguard.guards import loading
    from jaxguard.guards.backends.sglang import addresses
    from jaxguard.serve import native, page
    from jaxguard.serve.adapters import ADAPTERS
    from jaxguard.serve.app import create_app
    from jaxguard.serve.keys import Budget, Keys
    from jaxguard.serve.policies import Policies
    from jaxguard.serve.service import Service
    from jaxguard.serve.telemetry import Audit

    settings = guard.config.evaluate or EvaluateConfig()
    served = settings.guards[0]
    known = await loading.fingerprint(served, guard.config, settings)
    service = Service(
        guard,
        Policies(guard.policy, policy, folder),
        Keys(None if options.keys is None else Path(options.keys)),
        mode=guard.mode,
        model={"name": _name(str(served.checkpoint)), "digest": known.get("weights")},
        timeout=options.timeout,
        concurrent=options.concurrent * len(addresses(served.endpoint)) if served.endpoint else None,
        reasoning=Budget.per_minute(options.reasoning_tokens_per_minute),
        audit=None if options.audit is None else Audit(Path(options.audit), options.audit_texts),
    )

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, *_: object) -> None:
            """End in order; uvicorn would raise the signal again at the end, so that the process fails."""
            service.drain()
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

    loop = asyncio.get_running_loop()
    # Python's own handler would log an exception's message.
    loop.set_exception_handler(
        lambda _, context: logging.error("unexpected: %s", where(context.get("exception") or RuntimeError()))
    )
    loop.add_signal_handler(signal.SIGHUP, service.wake.set)
    logging.info("warming up")
    async with service:
        gc.freeze()  # what is loaded stays: to look through it again and again would stop the service for many milliseconds
        config = uvicorn.Config(
            create_app(service, native.add_routes, *ADAPTERS, *[page.add_routes] * options.demo_page),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="on",  # sets up what exports to OpenTelemetry, if the environment says so
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=options.drain,
        )
        logging.info("listening on %s, port %d", *listener.getsockname()[:2])
        await Server(config).serve([listener])


def _bind(host: str, port: int) -> socket.socket:
    """Take the port before a guard is loaded in vain; connections are refused until it listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off; an answer's body would otherwise wait 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise JaxguardError(f"cannot listen on --host {host} --port {port}: {error}; choose others") from None
    return listener


def _name(checkpoint: str) -> str:
    """What a model is called: its repository's name, or that of its run's folder."""
    path = Path(checkpoint)
    return path.resolve().parent.name if path.name == "export" else path.name


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("expected a number above 0")
    return number


def _options(parser: argparse.ArgumentParser) -> None:
    policies = names(CONFIG_FOLDER / "policies")
    parser.epilog = EPILOG.format(policies=", ".join(policies))
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="an export, a run's folder, a repository on the hub, or the addresses of model servers with commas between them",
    )
    policy = add(
        "--policy", metavar="NAME|PATH", help="of requests that name none; without, that of the model's training"
    )
    suggest(policy, lambda _: policies)
    add("--policies", metavar="FOLDER", help="of YAML files: policies that requests may name")
    add(
        "--mode",
        choices=list(map(str, MODES)),
        help="auto: direct where certified; it and reasoning also answer directly where asked; without, as trained",
    )
    add("--operating-point", metavar="NAME", help="threshold in the export's guard.json, as for jaxguard check")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=int, default=8080, help="port to listen on (8080)")
    add(
        "--keys", metavar="FILE", help="YAML with hashes of API keys; without, everybody who reaches the port may check"
    )
    add("--audit", metavar="FILE", help="append a JSON line for each verdict, without text")
    add("--demo-page", action="store_true", help="GET / is a page on which people try texts (none)")
    add(
        "--audit-texts",
        action="store_true",
        help="also write prompts and responses into it, as rows that a reviewer can label; they may be personal data",
    )
    add(
        "--reasoning-tokens-per-minute",
        type=_positive,
        metavar="N",
        help="that all answers in reasoning mode may take; more are refused (no limit)",
    )
    add(
        "--timeout",
        type=_positive,
        default=10,
        metavar="SECONDS",
        help="most that a check may take; requests may ask for less (10)",
    )
    add(
        "--concurrent",
        type=_positive,
        default=64,
        metavar="N",
        help="checks under way at each model server (64)",
    )
    add(
        "--drain",
        type=_positive,
        default=20,
        metavar="SECONDS",
        help="after SIGTERM, most until what is under way is answered (20)",
    )
    add("--tokenizer", metavar="FOLDER|REPOSITORY", help="for a server whose model does not lie on this machine")
    add("--config", metavar="NAME|PATH", help="of the run that trained the model, if it is not beside the export")


main = Command("serve", DESCRIPTION, _serve, _options)

if __name__ == "__main__":
    sys.exit(main())
