"""launch/sglang/serve.sbatch on this machine: SLURM, curl and both Pythons are stand-ins, the shell scripts are real."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KEY = "open 'sesame'"

# One task a node, as srun would; the leader first. With --kill-on-bad-exit the first bad end stops the others.
SRUN = """\
#!/bin/bash
echo "srun $*" >>"$CALLS"
echo "pid $$" >>"$CALLS"
for arg in "$@"; do
    case $arg in
        --nodelist=*) nodes=${arg#*=} ;;
        --output=*) output=${arg#*=} ;;
    esac
done
while [ "$1" != bash ]; do shift; done
trap 'kill $(jobs -p) 2>/dev/null' TERM
rank=0
for node in ${nodes//,/ }; do
    SLURM_PROCID=$rank NODE=$node "$@" >>"${output/\\%N/$node}" 2>&1 &
    rank=$((rank + 1))
done
code=0
for _ in ${nodes//,/ }; do
    wait -n || { code=$?; kill $(jobs -p) 2>/dev/null; }
done
exit $code
"""

SCONTROL = """\
#!/bin/bash
echo "scontrol $*" >>"$CALLS"
[ "$1" != show ] || printf '%s\\n' ${3//,/ }
"""

# The first health checks fail; those of HANGS always do.
CURL = """\
#!/bin/bash
url=${!#}
echo "curl $url" >>"$CALLS"
case $url in
    */health_generate) [ "$url" != "http://${HANGS:-}:30001/health_generate" ] && [ "$(grep -c "curl $url" "$CALLS")" -gt 1 ] ;;
    */readiness) [ "${DIES:-}" != router ] && [ "$(grep -c "curl $url" "$CALLS")" -gt 1 ] ;;
esac
"""

# A server or the router: runs until SIGTERM, or dies where DIES says.
SGLANG = """\
#!/bin/bash
trap 'echo "stopped ${NODE:-router}" >>"$CALLS"; exit 0' TERM
echo "sglang ${NODE:-router} $*" >>"$CALLS"
config=
for arg in "$@"; do [[ $arg != *.yaml ]] || config=$arg; done
if [ -n "$config" ]; then
    stat -c 'config %a' "$config" >>"$CALLS"
    cp "$config" "$(dirname "$CALLS")/${NODE}.yaml"
    rm "$config"
fi
[ "${NODE:-router}" != "${DIES:-}" ] || { echo "out of memory"; exit 3; }
while :; do sleep 0.2; done
"""

CLIENT = """\
#!/bin/bash
trap 'echo "stopped client" >>"$CALLS"; exit 143' TERM
echo "client $*" >>"$CALLS"
[ -z "${CLIENT_SLEEPS:-}" ] || while :; do sleep 0.2; done
exit "${CLIENT_CODE:-0}"
"""


@pytest.fixture
def start(tmp_path):
    """Starts the script in a folder of its own; what it started is gone afterwards."""
    folder = tmp_path / "jaxguard"
    shutil.copytree(ROOT / "launch", folder / "launch")
    stand_ins = {"bin/srun": SRUN, "bin/scontrol": SCONTROL, "bin/curl": CURL}
    for name, text in {**stand_ins, ".venv-sglang/bin/python": SGLANG, ".venv/bin/python": CLIENT}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    running = []

    def run(*arguments, nodes="n1", **environment):
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": nodes, "SLURM_CPUS_PER_TASK": "4", "JAXGUARD_API_KEY": KEY}
        ours = {"CALLS": str(folder / "calls"), "POLL_SECONDS": "0.05", "READY_SECONDS": "20"}
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        process = subprocess.Popen(
            ["bash", "launch/sglang/serve.sbatch", *arguments],
            cwd=folder,
            env={"PATH": path, "HOME": str(folder), "TMPDIR": str(tmp_path), **slurm, **ours, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        process.folder = folder
        return process

    yield run
    for process in running:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.communicate()


def calls(process, start=""):
    path = process.folder / "calls"
    return [line for line in path.read_text().splitlines() if line.startswith(start)] if path.exists() else []


def gone(group):
    """Whether a process group ends within a few seconds."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def ended(process):
    """(exit code, output, errors) of a job that left nothing running."""
    output, errors = process.communicate(timeout=30)
    assert gone(process.pid), "something still runs"
    return process.returncode, output, errors


def wait_for(process, start):
    until = time.monotonic() + 20
    while not calls(process, start):
        assert process.poll() is None
        assert time.monotonic() < until, f"no {start!r} in {calls(process)}"
        time.sleep(0.02)


def test_servers_router_client_and_an_orderly_end(start):
    job = start("deepseek-r1-h200", "wildguard_traces", "name=x", nodes="n1,n2")
    code, output, errors = ended(job)
    assert (code, errors) == (0, "")
    assert "2 replicas behind http://n1:30000/v1" in output
    assert calls(job, "client") == [
        "client -m jaxguard.distill --config wildguard_traces distill.teacher.endpoints=[http://n1:30000/v1] name=x"
    ]
    (router,) = [line for line in calls(job) if "--policy cache_aware --retry-max-retries 3" in line]
    assert router.endswith("--worker-urls http://n1:30001 http://n2:30001")
    order = [line.split()[0] for line in calls(job) if line.startswith(("srun", "client", "stopped"))]
    assert order == ["srun", "srun", "client", "stopped", "stopped", "stopped"]
    assert sorted(calls(job, "stopped")) == ["stopped n1", "stopped n2", "stopped router"]


def test_a_client_waits_for_every_replica(start):
    job = start("qwen3-32b", "wildguard_traces", nodes="n1,n2")
    assert ended(job)[0] == 0
    lines = calls(job)
    for node in ("n1", "n2"):
        assert lines.index(f"curl http://{node}:30001/health_generate") < lines.index(calls(job, "client")[0])
        assert len(calls(job, f"curl http://{node}:30001/health_generate")) >= 2


def test_nodes_of_one_replica_find_their_leader(start):
    job = start("deepseek-r1-h100", "wildguard_traces", nodes="n1,n2,n3,n4")
    assert ended(job)[0] == 0
    assert ["--nodelist=n1,n2" in line for line in calls(job, "srun")].count(True) == 1
    servers = {line.split()[1]: line for line in calls(job, "sglang n")}
    joined = {node: line.split("--dist-init-addr ")[1].split(" --node-rank ") for node, line in servers.items()}
    assert joined == {
        "n1": ["n1:20000", "0"],
        "n2": ["n1:20000", "1"],
        "n3": ["n3:20000", "0"],
        "n4": ["n3:20000", "1"],
    }
    assert calls(job, "curl http://n2") == calls(job, "curl http://n4") == []


def test_one_node_gets_no_leader(start):
    job = start("qwen3-32b", "wildguard_traces")
    assert ended(job)[0] == 0
    assert "--dist-init-addr" not in "".join(calls(job, "sglang n1"))


def test_the_key_is_in_no_command_line_and_in_a_private_file(start):
    job = start("qwen3-32b", "wildguard_traces")
    assert ended(job)[0] == 0
    assert "sesame" not in "".join(calls(job))
    assert calls(job, "config") == ["config 600"]
    written = yaml.safe_load((job.folder / "n1.yaml").read_text())
    assert written.pop("api-key") == KEY
    assert written == yaml.safe_load((ROOT / "launch/sglang/teachers/qwen3-32b.yaml").read_text())
    assert (job.folder / "runs/teacher-7").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("dead", ["n1", "n2", "n4"])
def test_a_server_that_dies_before_it_is_ready_ends_the_job(start, dead):
    begun = time.monotonic()
    job = start("deepseek-r1-h100", "wildguard_traces", nodes="n1,n2,n3,n4", DIES=dead, HANGS="n1", READY_SECONDS="600")
    code, _, errors = ended(job)
    assert code == 1
    assert "a server ended before all were ready; its log is in runs/teacher-7" in errors
    assert "out of memory" in (job.folder / f"runs/teacher-7/{dead}.log").read_text()
    assert time.monotonic() - begun < 20
    assert not calls(job, "client")


def test_a_router_that_dies_ends_the_job(start):
    code, _, errors = ended(start("qwen3-32b", "wildguard_traces", DIES="router"))
    assert code == 1
    assert "a server ended before all were ready" in errors


def test_a_server_that_never_answers_ends_the_job_within_the_bound(start):
    job = start("qwen3-32b", "wildguard_traces", nodes="n1,n2", HANGS="n2", READY_SECONDS="4")
    code, _, errors = ended(job)
    assert code == 1
    assert "http://n2:30001/health_generate did not answer within 4 s" in errors
    assert sorted(calls(job, "stopped")) == ["stopped n1", "stopped n2"]


@pytest.mark.parametrize(
    ("number", "exit_code", "requeued", "said"),
    [(signal.SIGUSR1, 75, ["scontrol requeue 7"], "out of time"), (signal.SIGTERM, 143, [], "")],
)
@pytest.mark.parametrize("client", [["wildguard_traces"], []])
def test_a_signal_stops_everything_and_only_lack_of_time_starts_again(start, client, number, exit_code, requeued, said):
    job = start("qwen3-32b", *client, CLIENT_SLEEPS="1")
    assert "1 replicas behind http://n1:30000/v1" in job.stdout.readline()
    if client:
        wait_for(job, "client")
    job.send_signal(number)
    code, _, errors = ended(job)
    assert code == exit_code
    assert said in errors
    assert calls(job, "scontrol requeue") == requeued
    assert sorted(calls(job, "stopped")) == [*(["stopped client"] if client else []), "stopped n1", "stopped router"]


def test_a_signal_while_the_weights_load(start):
    job = start("qwen3-32b", "wildguard_traces", HANGS="n1")
    wait_for(job, "config")
    job.send_signal(signal.SIGUSR1)
    assert ended(job)[0] == 75
    assert calls(job, "stopped") == ["stopped n1"]


def test_the_job_ends_as_its_client_does(start):
    job = start("qwen3-32b", "wildguard_traces", CLIENT_CODE="2")
    assert ended(job)[0] == 2
    assert sorted(calls(job, "stopped")) == ["stopped n1", "stopped router"]
    assert not calls(job, "scontrol requeue")


def test_a_server_that_ends_later_ends_a_job_without_client(start):
    job = start("qwen3-32b")
    assert "replicas behind" in job.stdout.readline()
    os.kill(int(calls(job, "pid")[0].split()[1]), signal.SIGTERM)
    code, _, errors = ended(job)
    assert code == 1
    assert "a server ended" in errors


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "sbatch --nodes=N launch/sglang/serve.sbatch TEACHER"),
        (["deepseek"], {}, "there is no launch/sglang/teachers/deepseek.yaml"),
        (["deepseek-r1-h100"], {"nodes": "n1,n2,n3"}, "takes 2 nodes a replica; the job has 3"),
        (["qwen3-32b"], {"JAXGUARD_API_KEY": ""}, "export JAXGUARD_API_KEY first"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(start, arguments, environment, message):
    job = start(*arguments, **environment)
    code, _, errors = ended(job)
    assert code != 0
    assert message in errors
    assert not calls(job, "srun")
