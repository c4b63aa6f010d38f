"""`jaxguard load --url ADDRESS --examples FILE`: simulate production traffic against a service, and report its latency."""

import argparse
import asyncio
import importlib.util
import ipaddress
import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.text import Text

from jaxguard.cli import Command
from jaxguard.config.data import SourceConfig
from jaxguard.utils.client import API_KEY
from jaxguard.utils.errors import JaxguardError
from jaxguard.utils.files import write_atomically
from jaxguard.utils.secrets import mask
from jaxguard.utils.terminal import Console
from jaxguard.utils.versions import install

DESCRIPTION = f"""\
Send checks to a service at times drawn beforehand, whatever became of the ones before, as independent users do. Latency counts
from the scheduled time, also of what was refused. A ramp finds the knee: the rate at which fewer than 95 % get a verdict within
the SLO. `steady` sends 70 % of that, `bursts` the same with gamma gaps (coefficient of variation 3), `overload` three times the
knee, `recovered` comes 2 s later, `long` has a fifth of long texts. Where this client itself is late, a phase is void.

Writes report.json and report.html into --output. With the environment variable {API_KEY} the requests bear a key.

examples:
  jaxguard load --url http://127.0.0.1:8080 --examples my/items.jsonl --slo-ms 500 --price 1.2
  jaxguard load --url http://127.0.0.1:8080 --examples my/items.jsonl --rate 5 --phase steady --policy aegis2=80 --policy bank=20
  jaxguard load --url https://guard.test --confirm-host guard.test --examples my/items.jsonl harmful=0.1 repeats=0
"""
SHARES = ("exchanges", "harmful", "repeats", "long")


def _load(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("httptools") is None:
        raise JaxguardError(f"jaxguard load needs httptools: {install('serve')}")
    # Imported late: this loads matplotlib and datasets.
    from jaxguard.data.sources import load_examples
    from jaxguard.load.page import page
    from jaxguard.load.run import PHASES, Plan, Simulation
    from jaxguard.load.traffic import Mix
    from jaxguard.report import write_page

    _check_host(options.url, options.confirm_host)
    phases = tuple(options.phase or Plan.phases)
    if unknown := set(phases) - set(PHASES):
        raise JaxguardError(f"--phase {min(unknown)}: known: {', '.join(PHASES)}")
    shares = dict(_share(word, SHARES) for word in options.shares)
    mix = Mix(**shares, policies=dict(map(_share, options.policy or ())))
    headers = {"authorization": f"Bearer {key}"} if (key := os.environ.get(API_KEY)) else {}
    plan = Plan(
        options.url, phases, options.seconds, options.slo_ms / 1000, options.rate, options.seed, options.price, headers
    )
    examples = load_examples(SourceConfig(kind="jsonl", path=options.examples))
    console, folder = Console(soft_wrap=True), Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)

    def tell(phase: str, summary: dict[str, Any]) -> None:
        share, median = summary["goodput_share"] or 0.0, summary["latency"]["p50"] or 0.0
        void = f"  void: {summary['void']}" if summary["void"] else ""
        console.print(Text(f"{phase}: {share:.1%} within the SLO, median {1000 * median:.4g} ms{void}"))

    simulation = Simulation(plan, examples, mix, tell)
    try:
        asyncio.run(simulation.run())
    finally:  # what was measured before Ctrl-C, or before the service ended
        write_atomically(folder / "report.json", json.dumps(simulation.results, indent=1, allow_nan=False) + "\n")
    write_page(folder / "report.html", page({"service": simulation.results}, f"Load of {mask(options.url)}"))
    console.print(Text(f"report: {folder / 'report.html'}"))
    return 0


def _check_host(url: str, confirmed: str | None) -> None:
    """JaxguardError: an address that is none, or another machine's that was not confirmed."""
    address = urlsplit(url)
    host = address.hostname
    if address.scheme not in ("http", "https") or not host:
        raise JaxguardError(f"--url {url}: expected an address such as http://127.0.0.1:8080")
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and host != confirmed:
        raise JaxguardError(
            f"--url {url}: {host} is not this machine, and a load test can make it unavailable; if it is yours, repeat its "
            f"name: --confirm-host {host}"
        )


def _share(word: str, known: tuple[str, ...] = ()) -> tuple[str, float]:
    """A name and its number from `name=number`."""
    name, _, value = word.partition("=")
    try:
        if not name or (known and name not in known):
            raise ValueError
        return name, float(value)
    except ValueError:
        raise JaxguardError(f"{word!r}: expected {'|'.join(known) or 'NAME'}=NUMBER") from None


def _positive(text: str) -> float:
    if not 0 < (number := float(text)) < 1e6:
        raise argparse.ArgumentTypeError("expected a number above 0")
    return number


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8080", help="of the service (http://127.0.0.1:8080)")
    add(
        "--examples", required=True, metavar="FILE", help="labelled JSON lines to draw the texts from, see docs/data.md"
    )
    add(
        "--slo-ms",
        type=_positive,
        default=500,
        help="milliseconds in which a verdict is of use; sent as the deadline (500)",
    )
    add("--rate", type=_positive, help="requests a second of the steady phase; without, a ramp finds the knee")
    add("--seconds", type=_positive, default=20, help="of each phase; a step of the ramp takes half as long (20)")
    add(
        "--phase",
        action="append",
        metavar="NAME",
        help="steady, bursts, overload, recovered (all four) or long; repeat it",
    )
    add("--policy", action="append", metavar="NAME=WEIGHT", help="of the requests; repeat it; without, they name none")
    add("--price", type=_positive, help="of the machine an hour, for the cost of a million verdicts")
    add("--seed", type=int, default=0, help="of the traffic (0)")
    add("--output", default="runs/load", metavar="FOLDER", help="of the report (runs/load)")
    add("--confirm-host", metavar="HOST", help="must repeat the name of a host that is not this machine")
    add(
        "shares",
        nargs="*",
        metavar="share=NUMBER",
        help="of the requests: exchanges (0.3), harmful (0.05), repeats (0.1), long (0.01), from 0 to 1",
    )


main = Command("load", DESCRIPTION, _load, _options)

if __name__ == "__main__":
    sys.exit(main())
