"""launch/gke: JobSets by their public API (jobset.x-k8s.io/v1alpha2), and that what they start can find each other."""

import copy
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxguard.config import load
from jaxguard.train.hosts import REQUEUE

GKE = Path(__file__).resolve().parents[2] / "launch/gke"
TARGETS = ("gpu", "tpu")
# Chips of one node and the topologies that its slices have here: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
TPUS = {"tpu-v5-lite-podslice": (4, 2), "tpu-v6e-slice": (4, 2)}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Rule(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    action: Literal["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
    onJobFailureReasons: list[Literal["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]] = []
    targetReplicatedJobs: list[str] = []


class FailurePolicy(Strict):
    maxRestarts: Annotated[int, Field(ge=0)] = 0
    restartStrategy: Literal["Recreate", "BlockingRecreate"] = "Recreate"
    rules: list[Rule] = []


class ReplicatedJob(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
    replicas: Annotated[int, Field(ge=1)] = 1
    template: dict[str, Any]


class Spec(Strict):
    failurePolicy: FailurePolicy = FailurePolicy()
    replicatedJobs: Annotated[list[ReplicatedJob], Field(min_length=1)]
    suspend: bool = False
    ttlSecondsAfterFinished: int | None = None


class JobSet(Strict):
    apiVersion: Literal["jobset.x-k8s.io/v1alpha2"]
    kind: Literal["JobSet"]
    metadata: dict[str, Any]
    spec: Spec


def read(target):
    return yaml.safe_load((GKE / f"{target}.yaml").read_text(encoding="utf-8"))


@pytest.fixture(params=TARGETS)
def target(request):
    return request.param


@pytest.fixture
def job(target):
    """The spec of the one Job that a JobSet makes."""
    (job,) = JobSet.model_validate(read(target)).spec.replicatedJobs
    return job.template["spec"]


@pytest.fixture
def pod(job):
    return job["template"]["spec"]


@pytest.fixture
def container(pod):
    (container,) = pod["containers"]
    return container


def test_every_manifest_is_tested():
    assert sorted(path.stem for path in GKE.iterdir()) == ["gpu", "network", "tpu"]


@pytest.mark.parametrize("field", ["failurePolicy", "replicatedJobs"])
def test_a_misspelt_field_of_the_set_is_refused(target, field):
    broken = copy.deepcopy(read(target))
    broken["spec"][f"{field}s"] = broken["spec"].pop(field)
    with pytest.raises(ValidationError, match=f"{field}s"):
        JobSet.model_validate(broken)


def test_a_saved_stop_and_a_lost_node_start_all_again_and_other_failures_a_few_times(target, job, container):
    policy = JobSet.model_validate(read(target)).spec.failurePolicy
    assert policy.maxRestarts == 3
    (rule,) = policy.rules
    assert (rule.action, rule.onJobFailureReasons) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    assert job["backoffLimit"] == 0
    stopped, lost = job["podFailurePolicy"]["rules"]
    assert stopped["action"] == lost["action"] == "FailJob"
    assert stopped["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [REQUEUE]}
    assert lost["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_the_command_is_one_that_training_takes(target, job, container, monkeypatch):
    monkeypatch.chdir(GKE.parents[1])
    jaxguard, train, option, name, *overrides = container["command"]
    assert (jaxguard, train, option) == ("jaxguard", "train", "--config")
    config = load(name, [word.replace("$(PROCESS)", "0") for word in overrides])
    (mount,) = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "runs"]
    assert str(config.run_folder) == mount
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    if target == "tpu":
        assert config.mesh.hosts == "auto", "GKE tells every host of a slice who the others are"
        return
    jobs = read(target)
    first = f"{jobs['metadata']['name']}-{jobs['spec']['replicatedJobs'][0]['name']}-0-0.{jobs['metadata']['name']}"
    assert config.mesh.coordinator is not None
    assert config.mesh.coordinator.rpartition(":")[0] == first
    assert config.mesh.processes == job["parallelism"]
    (process,) = container["env"]
    assert process["name"] == "PROCESS"
    assert "job-completion-index" in process["valueFrom"]["fieldRef"]["fieldPath"]


def test_the_hosts_hold_all_the_chips_of_the_slice(target, job, pod, container):
    limits = container["resources"]["limits"]
    if target == "gpu":
        assert limits == {"nvidia.com/gpu": 8}
        return
    chips, dimensions = TPUS[pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]]
    topology = [int(size) for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    assert limits == {"google.com/tpu": chips}
    assert len(topology) == dimensions
    assert math.prod(topology) == chips * job["parallelism"]


def test_the_environment_and_the_bucket_are_those_of_the_readme(target, job, pod, container):
    readme = (GKE.parent / "README.md").read_text(encoding="utf-8")
    settings, secret = container["envFrom"]
    create = f"kubectl create configmap {settings['configMapRef']['name']} --from-env-file=launch/env/{target}.env"
    assert create in readme
    assert f"kubectl create secret generic {secret['secretRef']['name']} " in readme
    assert f"serviceaccount {pod['serviceAccountName']}" in readme
    assert job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    (runs,) = [volume for volume in pod["volumes"] if volume["name"] == "runs"]
    assert runs["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    user = "useradd --create-home --uid 1000"
    assert user in (GKE.parent / "docker/Dockerfile").read_text(encoding="utf-8")
    assert "uid=1000,gid=1000" in runs["csi"]["volumeAttributes"]["mountOptions"]
