"""What an attacker finds in a cluster: no privileges, no open ports, no image or model that may change under its name."""

import re
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
FILES = sorted(path for path in LAUNCH.rglob("*.yaml") if path.parent.name in {"gke", "kubernetes"})
RESOURCES = [resource for path in FILES for resource in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
TEACHERS = {path.stem: yaml.safe_load(path.read_text()) for path in (LAUNCH / "sglang/teachers").glob("*.yaml")}
ROOT_IMAGES = ("lmsysorg/sglang:",)
JOB_SET = "jobset.sigs.k8s.io/jobset-name"


def pods():
    """(labels, spec) of every pod, those of a JobSet with the label that its operator adds."""

    def walk(tree, name):
        if isinstance(tree, dict):
            if "containers" in tree.get("spec", {}):
                yield tree["metadata"].get("labels", {JOB_SET: name}), tree["spec"]
            for inner in tree.values():
                yield from walk(inner, name)
        elif isinstance(tree, list):
            for inner in tree:
                yield from walk(inner, name)

    return [pod for resource in RESOURCES for pod in walk(resource, resource["metadata"]["name"])]


def selects(selector, labels):
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", ()))


@pytest.mark.parametrize(("labels", "spec"), pods())
def test_a_pod_has_no_privileges(labels, spec):
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        if not container["image"].startswith(ROOT_IMAGES):
            assert spec["securityContext"]["runAsNonRoot"] is True
            assert spec["securityContext"]["runAsUser"] > 0


@pytest.mark.parametrize(("labels", "spec"), pods())
def test_an_image_is_known_by_its_digest(labels, spec):
    """Kubernetes refuses the name until DIGEST is replaced."""
    for container in spec["containers"]:
        assert re.fullmatch(r"[\w./-]+:[\w.]+@sha256:(DIGEST|[0-9a-f]{64})", container["image"])
    assert "DIGEST" in (LAUNCH / "README.md").read_text()


@pytest.mark.parametrize(("labels", "spec"), pods())
def test_a_pod_is_reached_by_its_own_alone(labels, spec):
    policies = [
        r["spec"] for r in RESOURCES if r["kind"] == "NetworkPolicy" and selects(r["spec"]["podSelector"], labels)
    ]
    assert policies
    for policy in policies:
        assert policy["policyTypes"] == ["Ingress"]
        for rule in policy["ingress"]:
            assert rule["from"]
            for source in rule["from"]:
                assert set(source) <= {"podSelector", "namespaceSelector"}
                assert source["podSelector"]


def test_metrics_are_not_open():
    for resource in RESOURCES:
        assert resource["kind"] == "NetworkPolicy" or "prometheus" not in str(resource)
    assert not any("enable-metrics" in teacher for teacher in TEACHERS.values())
    router = (LAUNCH / "sglang/router.sh").read_text()
    assert re.findall(r"--prometheus-host (\S+)", router) == ["127.0.0.1"]


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_is_one_commit(name):
    teacher = TEACHERS[name]
    if not teacher["model-path"].startswith("models/"):
        assert re.fullmatch(r"[0-9a-f]{40}|REVISION", teacher["revision"])
