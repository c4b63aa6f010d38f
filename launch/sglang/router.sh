#!/bin/bash
# The router before a teacher's servers: router.sh --worker-urls URL ...
# It needs their key, without which it cannot tell which model they serve, and takes it from a flag only: set it inside.
# Its metrics are for whoever may log in on the node, or forward a port of the pod: Prometheus shows no key.
set -euo pipefail
: "${JAXGUARD_API_KEY:?the key of the servers}"

exec "${SGLANG_PYTHON:-python3}" -c '
import os, sys
from sglang_router.launch_router import main
sys.argv += ["--api-key", os.environ["JAXGUARD_API_KEY"]]
main()
' --host 0.0.0.0 --port 30000 --policy cache_aware --retry-max-retries 3 --health-check-interval-secs 10 \
    --prometheus-host 127.0.0.1 --prometheus-port 29000 "$@"
