"""launch/slurm/train.sbatch: what it starts, with stand-ins for SLURM; and whole under a real SLURM of two pretended nodes."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "launch/slurm/train.sbatch"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]

STAND_INS = {
    "srun": '#!/bin/bash\necho "srun $*" >>calls\nenv >environment\nexit "${CODE:-0}"\n',
    "scontrol": '#!/bin/bash\necho "scontrol $*" >>calls\n',
    "sglang": '#!/bin/bash\necho "$CUDA_VISIBLE_DEVICES: $*" >>server\nfor i in {1..100}; do sleep 0.1; done\necho left >>server\n',
    "curl": '#!/bin/bash\n[ -e server ] && [ -n "${ANSWERS-yes}" ]\n',
}


@pytest.fixture
def start(tmp_path):
    """Runs the script as the first node of a job; (exit code, calls, the environment of srun)."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for name, text in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(*arguments, **environment):
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "32", **environment}
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", SCRIPT, *arguments], cwd=tmp_path, env={"PATH": path, **job}, capture_output=True, text=True
        )
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        seen = (tmp_path / "environment").read_text().splitlines() if calls else [done.stderr]
        return done.returncode, calls, seen

    return run


@pytest.mark.parametrize("asked", ["8", "a100:8"])
def test_a_task_drives_all_the_gpus_of_its_node(start, asked):
    code, calls, environment = start("gemma4b_full", "mesh.data=4", SLURM_GPUS_PER_NODE=asked, SLURM_JOB_NUM_NODES="4")
    assert code == 0
    assert len(calls) == 1
    assert calls[0].endswith(" -m jaxguard.train --config gemma4b_full mesh.hosts=auto mesh.data=4")
    assert "JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7" in environment
    assert "JAX_PLATFORMS=cuda" in environment


def test_reinforcement_learning_is_another_stage(start):
    code, calls, _ = start("reinforce", "llama8b_grpo_hard", "seed=1", SLURM_GPUS_PER_NODE="8")
    assert code == 0
    assert calls[0].endswith(" -m jaxguard.reinforce --config llama8b_grpo_hard mesh.hosts=single seed=1")
    assert start("reinforce")[0] != 0


def test_a_server_samples_on_the_last_gpus_while_the_others_train(start, tmp_path):
    job = {"SLURM_GPUS_PER_NODE": "8", "SGLANG_PYTHON": "sglang", "POLL_SECONDS": "0.05"}
    rollouts = {"ROLLOUT_GPUS": "2", "ROLLOUT_MODEL": "runs/first/export"}
    code, calls, environment = start("reinforce", "llama8b_grpo_hard", "seed=1", **job, **rollouts)
    assert code == 0
    assert calls[0].endswith(" mesh.hosts=single seed=1 reinforce.endpoint=http://127.0.0.1:30000")
    assert "JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5" in environment
    [server] = (tmp_path / "server").read_text().splitlines()  # ended with the run
    assert server.startswith("6,7: -m sglang.launch_server --model-path runs/first/export --dp-size 2 ")
    for wrong in ({"ROLLOUT_GPUS": "8"}, {"ROLLOUT_MODEL": ""}, {"SGLANG_PYTHON": "false", "ANSWERS": ""}):
        code, after, _ = start("reinforce", "llama8b_grpo_hard", **job | rollouts | wrong)
        assert code != 0
        assert after == calls, wrong


@pytest.mark.parametrize("asked", [{}, {"SLURM_GPUS_PER_NODE": "0"}])
def test_without_gpus_it_is_the_cpu(start, asked):
    _, calls, environment = start("tiny", **asked)
    assert calls[0].endswith(" --config tiny mesh.hosts=single")
    assert "JAX_PLATFORMS=cpu" in environment
    assert not [line for line in environment if line.startswith("JAX_LOCAL_DEVICE_IDS")]


@pytest.mark.parametrize(("code", "requeued"), [(0, []), (2, []), (75, ["scontrol requeue 7"]), (137, [])])
def test_only_a_saved_run_goes_back_into_the_queue(start, code, requeued):
    ended, calls, _ = start("tiny", CODE=str(code))
    assert ended == code
    assert calls[1:] == requeued


def test_without_a_config_nothing_starts(start):
    code, calls, errors = start()
    assert code != 0
    assert not calls
    assert "usage: sbatch launch/slurm/train.sbatch [reinforce] CONFIG" in errors[0]


# Two nodes that are this machine, under addresses that are also their names: jax's coordinator is looked up by such a name.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
KillWait=5
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=127.0.0.1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 Gres=gpu:8
NodeName=127.0.0.2 NodeAddr=127.0.0.2 Port={ports[2]} CPUs=64 Gres=gpu:8
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"after {seconds} s still not: {what()}"
        time.sleep(0.2)
    return result


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Calls SLURM's programs; its daemons run as this user, and end with the tests."""
    if MISSING:
        pytest.skip(f"no {MISSING[0]} here: apt-get install slurmctld slurmd slurm-client munge")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    for number in range(8):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    text = CONFIGURATION.format(folder=folder, ports=free_ports(3), user=os.environ.get("USER") or "root")
    (folder / "slurm.conf").write_text(text)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    path = f"{os.environ['PATH']}:/usr/sbin"
    environment = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    daemons = []

    def daemon(*command):
        with (folder / f"{command[0]}-{len(daemons)}.out").open("w") as log:
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))

    def call(*command, **more):
        done = subprocess.run(command, env=environment | more, cwd=ROOT, capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else done.stderr

    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemon("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
    daemon("slurmctld", "-D", "-c")
    for node in ("127.0.0.1", "127.0.0.2"):
        daemon("slurmd", "-D", "-N", node)
    try:
        wait_for(lambda: call("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D") == "2", 60, lambda: call("sinfo"))
        yield call
    finally:
        for job in call("squeue", "-h", "-o", "%i").split():
            call("scancel", job)
        for _ in range(60):  # what still runs would outlive the daemons
            if not call("squeue", "-h"):
                break
            time.sleep(1)
        for one in reversed(daemons):
            one.terminate()
        for one in daemons:
            one.wait(timeout=30)


class Job:
    """One submitted job on both nodes."""

    def __init__(self, slurm, folder, *arguments):
        self.slurm, self.output = slurm, folder / "job.out"
        said = slurm("sbatch", "--parsable", "--nodes=2", f"--output={self.output}", *arguments)
        assert said.isdigit(), said
        self.id = said

    def said(self):
        return self.output.read_text() if self.output.exists() else ""

    def scontrol(self, field):
        words = self.slurm("scontrol", "show", "job", self.id).split()
        return next((word.split("=", 1)[1] for word in words if word.startswith(f"{field}=")), "")

    def until(self, text, times=1, seconds=180):
        wait_for(lambda: self.said().count(text) == times, seconds, lambda: f"{times} × {text!r}: {self.said()}")

    def until_state(self, state, seconds=180):
        wait_for(lambda: self.scontrol("JobState") == state, seconds, lambda: f"{state}: {self.said()}")

    def goes_on(self):
        """Start a job that was put back into the queue; by itself SLURM waits two minutes."""
        self.until_state("PENDING")
        self.slurm("scontrol", "update", f"JobId={self.id}", "StartTime=now")


# A task that saves when it is asked to stop, the second one later.
TASK = """\
#!/bin/bash
trap 'sleep $((1 + 2 * SLURM_PROCID)); echo "saved"; exit 75' TERM
echo "task $SLURM_PROCID of $SLURM_NTASKS has $JAX_LOCAL_DEVICE_IDS after ${SLURM_RESTART_COUNT:-0} restarts"
while :; do sleep 0.2; done
"""


@pytest.mark.slow
def test_time_limit_and_preemption_put_the_job_back_and_scancel_ends_it(slurm, tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(TASK)
    python.chmod(0o755)
    here = f"--chdir={tmp_path}"
    job = Job(slurm, tmp_path, here, "--time=6", SCRIPT, "tiny")  # signalled five minutes before the end
    for task in (0, 1):
        job.until(f"task {task} of 2 has 0,1,2,3,4,5,6,7 after 0 restarts")
    job.until("saved", times=2)
    job.goes_on()
    job.until("of 2 has 0,1,2,3,4,5,6,7 after 1 restarts", times=2)
    slurm("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    slurm("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    job.until("saved", times=4)
    job.goes_on()
    job.until("of 2 has 0,1,2,3,4,5,6,7 after 2 restarts", times=2)
    slurm("scancel", job.id)
    job.until_state("CANCELLED")
    wait_for(lambda: not slurm("squeue", "-h"), 60, job.said)
    assert job.scontrol("JobState") == "CANCELLED"
    assert job.scontrol("Restarts") == "2"


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.slow
def test_two_nodes_learn_what_one_process_learns_and_go_on_after_a_stop(slurm, tiny_files, tmp_path):
    config = tiny_files(
        tmp_path,
        mesh={"fsdp": 2},
        data={"validation_size": 0},
        optimizer={"schedule": "constant"},
        train={"max_steps": 80, "epochs": 80, "evaluate_every": 0},
        checkpoint={"every": 50},
    )
    run = tmp_path / "runs/tiny"
    job = Job(slurm, tmp_path, "--gpus-per-node=0", "--cpus-per-task=1", SCRIPT, str(config))
    wait_for(lambda: (run / "metrics.jsonl").exists() and losses(run), 180, job.said)
    slurm("scancel", "--signal=TERM", f"{job.id}.0")  # as at the time limit: the tasks, not the script
    job.until("stopped by signal after step")
    (stopped,) = [int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    job.goes_on()
    job.until(f"resuming from the checkpoint of step {stopped} of 80")
    job.until_state("COMPLETED")
    assert (run / "export/jaxguard.json").is_file()
    assert json.loads((run / "versions.json").read_text())["processes"] == 2
    result = losses(run)
    assert len(result) == 80

    environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", "jaxguard.train", "--config", str(config), "name=one", "train.max_steps=12"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    assert result[:12] == pytest.approx(losses(tmp_path / "runs/one"), rel=1e-5)
