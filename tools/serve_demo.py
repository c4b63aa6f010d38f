"""`make serve-demo`: the guard of `make demo` as a service on this machine, with a page on which to try texts.

Trains it first if it is not there. Arguments are options of `jaxguard serve`, such as --port 9000.
"""

import shlex
import sys
from collections.abc import Sequence

import demo
from jaxguard.cli import UsageError
from jaxguard.config import load
from jaxguard.serve.__main__ import main as serve

EXCHANGE = f'{{"prompt": "{demo.QUESTION}", "response": "{demo.ANSWER}"}}'


def main(arguments: Sequence[str]) -> int:
    folder = load("smollm_demo").folder
    command = ["--model", str(folder), "--demo-page", *arguments]
    try:
        url = f"http://127.0.0.1:{serve.parser().parse_args(command).port}"
    except UsageError:
        return serve(command)  # says what is wrong, before anything is trained
    if not (folder / "export/config.json").is_file() and (code := demo.main([])):
        return code
    print(
        f"""
{url} is a page on which to try texts, once the service says that it listens. Or:

  curl {url}/v1/check -H 'content-type: application/json' -d '{EXCHANGE}'
  curl {url}/v1/policies
  curl {url}/metrics

$ jaxguard serve {shlex.join(command)}        # Ctrl-C ends it
""",
        flush=True,
    )
    return serve(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
