"""launch/sglang/serve.sbatch on this machine: SLURM, curl and both Pythons are stand-ins, the shell scripts are real."""

import ast
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
words=$*
echo "sglang ${NODE:-router} ${words//$'\n'/ }" >>"$CALLS"
[ -z "${NODE:-}" ] || echo "config" >>"$CALLS"
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


def test_the_key_is_in_no_command_line_and_no_file(start, tmp_path):
    job = start("qwen3-32b", "wildguard_traces")
    assert ended(job)[0] == 0
    assert "sesame" not in "".join(calls(job))
    assert (job.folder / "runs/teacher-7").stat().st_mode & 0o077 == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file() and "sesame" in path.read_text()] == []


@pytest.mark.parametrize(("script", "module"), [("worker", "sglang.launch_server"), ("router", "sglang_router")])
def test_a_server_gets_its_key_and_nobody_sees_it(script, module, tmp_path):
    """A Python module in SGLang's place writes what it was started with, as itself and as everyone else sees it."""
    code = "import sys; from pathlib import Path; print(sys.argv[1:]); print(Path('/proc/self/cmdline').read_bytes())"
    for path, text in {
        "sglang/launch_server.py": f"if __name__ == '__main__': {code}",
        "sglang_router/launch_router.py": f"def main(): {code}",
    }.items():
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(
            text.replace("; from", "\n    from").replace("; print", "\n    print").replace(": import", ":\n    import")
        )
    arguments = (
        ["launch/sglang/teachers/qwen3-32b.yaml"] if script == "worker" else ["--worker-urls", "http://n1:30001"]
    )
    environment = {"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"], "SGLANG_PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", f"launch/sglang/{script}.sh", *arguments],
        cwd=ROOT, env={**environment, "JAXGUARD_API_KEY": KEY, "TMPDIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    argv, visible = done.stdout.splitlines()
    words = ast.literal_eval(argv)
    assert words[words.index("--api-key") + 1] == KEY
    assert set(arguments) <= set(words)
    assert "sesame" not in visible
    assert list(tmp_path.rglob("*.yaml")) == []


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("model-path: owner/model\n", 1),
        ("model-path: owner/model\nrevision: main\n", 1),
        ("model-path: owner/model\nrevision: REVISION\n", 1),
        (f"model-path: owner/model\nrevision: {'0123456789' * 4}\n", 0),
        ("model-path: models/here\n", 0),
        ("model-path: /models/here\n", 0),
    ],
)
def test_a_teacher_from_the_hub_names_its_commit(text, code, tmp_path):
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(text)
    environment = {"PATH": os.environ["PATH"], "SGLANG_PYTHON": "true", "JAXGUARD_API_KEY": KEY}
    done = subprocess.run(
        ["bash", "launch/sglang/worker.sh", str(teacher)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code
    assert (str(teacher) in done.stderr) == bool(code)


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
