"""The Kubernetes manifests of launch/ against Kubernetes' own schemas, and against the teachers that they start."""

import copy
import re
from pathlib import Path

import pytest
import yaml

from jaxguard.config import load

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
MANIFESTS = sorted(path for path in LAUNCH.rglob("*.yaml") if path.parent.name in {"gke", "kubernetes"})
TEACHERS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((LAUNCH / "sglang/teachers").glob("*.yaml"))}
VERSIONS = ("1.31", "1.34")
PARSERS = {"deepseek-ai": "deepseek-r1", "meituan": "deepseek-r1", "Qwen": "qwen3", "openai": "gpt-oss"}


def resources(path):
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def manifest(name):
    (resource,) = resources(LAUNCH / "sglang/kubernetes" / f"{name}.yaml")
    return resource


def with_schema(resource):
    """The resource as what has a schema: a JobSet's templates as Jobs, a LeaderWorkerSet's as Deployments."""
    if resource["kind"] == "JobSet":
        return [
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": resource["metadata"], **job["template"]}
            for job in resource["spec"]["replicatedJobs"]
        ]
    if resource["kind"] != "LeaderWorkerSet":
        return [resource]
    template = resource["spec"]["leaderWorkerTemplate"]
    return [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": resource["metadata"],
            "spec": {"selector": {"matchLabels": pod["metadata"]["labels"]}, "template": pod},
        }
        for pod in (template["leaderTemplate"], template["workerTemplate"])
    ]


def check(resource, version="1.34"):
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for known in with_schema(resource):
        validator.validate(known, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_every_manifest_keeps_to_the_schema(path, version):
    objects = resources(path)
    assert objects
    for resource in objects:
        check(resource, version)


def misspell(resource, *keys):
    """The resource with the last of the keys misspelt."""
    broken = copy.deepcopy(resource)
    inside = broken
    for key in keys[:-1]:
        inside = inside[key]
    inside[f"{keys[-1]}s"] = inside.pop(keys[-1])
    return broken


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("qwen3-32b", ("spec", "strategy")),
        ("qwen3-32b", ("spec", "template", "spec", "containers", 0, "command")),
        ("qwen3-32b", ("spec", "template", "spec", "containers", 0, "startupProbe", "failureThreshold")),
        ("deepseek-r1-h100", ("spec", "leaderWorkerTemplate", "leaderTemplate", "spec", "nodeSelector")),
        ("deepseek-r1-h100", ("spec", "leaderWorkerTemplate", "workerTemplate", "spec", "volumes", 0, "configMap")),
    ],
)
def test_a_misspelt_field_is_refused(name, keys):
    pytest.importorskip("kubernetes_validate")
    from kubernetes_validate.utils import ValidationError

    check(manifest(name))
    with pytest.raises(ValidationError, match=f"{keys[-1]}s"):
        check(misspell(manifest(name), *keys))


@pytest.mark.parametrize("name", [name for name, teacher in TEACHERS.items() if teacher["nnodes"] > 1])
def test_a_group_is_a_leader_worker_set(name):
    """What its operator's schema says: only these fields, and one pod for each node."""
    resource = manifest(name)
    assert set(resource) == {"apiVersion", "kind", "metadata", "spec"}
    assert resource["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert set(resource["spec"]) == {"replicas", "leaderWorkerTemplate"}
    template = resource["spec"]["leaderWorkerTemplate"]
    assert set(template) == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"
    assert template["size"] == TEACHERS[name]["nnodes"]
    assert template["leaderTemplate"]["spec"] == template["workerTemplate"]["spec"]


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_has_a_manifest_that_starts_it_with_the_gpus_it_needs(name):
    teacher = TEACHERS[name]
    pods = [resource["spec"]["template"] for resource in with_schema(manifest(name))]
    assert [pod["metadata"]["labels"]["role"] for pod in pods] == ["server", "worker"][: len(pods)]
    assert (len(pods) == 2) == (teacher["nnodes"] > 1)
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        joins = ["$(LWS_LEADER_ADDRESS)", "$(LWS_WORKER_INDEX)"] if teacher["nnodes"] > 1 else []
        assert container["command"] == ["bash", "/launch/worker.sh", f"/launch/{name}.yaml", *joins]
        gpus = teacher["tp-size"] * teacher.get("dp-size", 1)
        assert container["resources"]["limits"]["nvidia.com/gpu"] * teacher["nnodes"] == gpus
        assert container["startupProbe"]["httpGet"]["path"] == "/health_generate"
        assert container["ports"] == [{"name": "http", "containerPort": 30001}]


def test_the_router_looks_for_the_labels_and_the_port_of_the_servers():
    (router,) = [r for r in resources(LAUNCH / "sglang/kubernetes/router.yaml") if r["kind"] == "Deployment"]
    command = router["spec"]["template"]["spec"]["containers"][0]["command"]
    wanted = dict(label.split("=") for label in command[command.index("--selector") + 1 :])
    for name in TEACHERS:
        labels = [resource["spec"]["template"]["metadata"]["labels"] for resource in with_schema(manifest(name))]
        assert [wanted == label for label in labels] == [True, False][: len(labels)]
    assert "--service-discovery-port=30001" in command
    assert "--port 30001" in (LAUNCH / "sglang/worker.sh").read_text()


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_says_who_it_is_and_how_it_thinks(name):
    teacher = TEACHERS[name]
    assert teacher["reasoning-parser"] == PARSERS[teacher["served-model-name"].split("/")[0]]
    assert "api-key" not in teacher
    text = (LAUNCH / "sglang/teachers" / f"{name}.yaml").read_text()
    assert re.search(rf"^nnodes: {teacher['nnodes']}$", text, re.MULTILINE), (
        "serve.sbatch reads it from a line of its own"
    )


def test_the_shipped_config_asks_a_shipped_teacher():
    config = load("wildguard_traces")
    assert config.distill is not None
    names = [name for name, teacher in TEACHERS.items() if teacher["served-model-name"] == config.distill.teacher.model]
    assert {"deepseek-r1-h200", "deepseek-r1-h100", "deepseek-r1-a100"} <= set(names)
    assert not any("int8" in name for name in names), "other weights are another teacher"
