"""`python -m jaxguard`: list the stages, or run one."""

import sys

from jaxguard.cli import main

if __name__ == "__main__":
    sys.exit(main())
