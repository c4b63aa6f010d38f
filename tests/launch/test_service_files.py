"""launch/service: what it starts has those flags and that port, and what it watches are metrics of the service."""

import configparser
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

pytest.importorskip("prometheus_client")

from jaxguard.serve.__main__ import main
from jaxguard.serve.telemetry import Metrics

FOLDER = Path(__file__).resolve().parents[2] / "launch/service"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
KUBERNETES = {
    resource["kind"]: resource for resource in yaml.safe_load_all((FOLDER / "kubernetes/guard.yaml").read_text("utf-8"))
}
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""], "info": ["_info"]}


def unit():
    """The systemd unit as sections; of a repeated name the last one."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters="=")
    parser.optionxform = str
    parser.read_string((FOLDER / "jaxguard.service").read_text(encoding="utf-8").replace("\\\n", ""))
    return parser


def container():
    [container] = KUBERNETES["Deployment"]["spec"]["template"]["spec"]["containers"]
    return container


def commands():
    return {
        "compose": COMPOSE["services"]["guard"]["command"],
        "systemd": shlex.split(unit()["Service"]["ExecStart"])[1:],
        "kubernetes": container()["command"][1:],
    }


def options(where):
    stage, *words = commands()[where]
    assert stage == "serve"
    return main.parser().parse_args(words)


def metrics():
    """Name of each sample -> labels that it may have, those of Prometheus included."""
    known = {}
    for metric in vars(Metrics()).values():
        for family in metric.describe() if hasattr(metric, "describe") else ():
            labels = {*metric._labelnames, "job", "instance", "le"} | (
                {"name", "digest", "policy"} if family.type == "info" else set()
            )
            known |= {family.name + suffix: labels for suffix in SUFFIXES[family.type]}
    return known


@pytest.mark.parametrize("where", commands())
def test_the_command_parses_and_wants_keys(where):
    assert options(where).keys, "whoever reaches the port may check"
    assert options(where).port == 8080


def test_ports_agree():
    guard = COMPOSE["services"]["guard"]
    assert options("compose").host == options("kubernetes").host == "0.0.0.0"
    assert options("systemd").host == "127.0.0.1"
    assert all(
        port.startswith("127.0.0.1:") for service in COMPOSE["services"].values() for port in service.get("ports", ())
    )
    assert guard["ports"] == ["127.0.0.1:8080:8080"]
    assert ":8080/readyz" in guard["healthcheck"]["test"][-1]
    assert "guard:8080" in COMPOSE["configs"]["prometheus"]["content"]
    assert container()["ports"] == [{"name": "http", "containerPort": 8080}]
    assert KUBERNETES["NetworkPolicy"]["spec"]["ingress"][0]["ports"] == [{"port": 8080}]
    [port] = KUBERNETES["Service"]["spec"]["ports"]
    assert port["targetPort"] == "http"


def test_the_end_waits_for_the_drain():
    """SIGTERM, --drain for what is under way, and as long again for what the guard still computes."""
    assert unit()["Service"]["KillSignal"] == "SIGTERM"
    assert int(unit()["Service"]["TimeoutStopSec"]) > 2 * options("systemd").drain
    assert int(COMPOSE["services"]["guard"]["stop_grace_period"].removesuffix("s")) > 2 * options("compose").drain
    assert COMPOSE["services"]["guard"]["init"] is True
    pod = KUBERNETES["Deployment"]["spec"]["template"]["spec"]
    pause = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    readiness = container()["readinessProbe"]
    assert pause >= readiness["periodSeconds"] * readiness["failureThreshold"]
    assert pod["terminationGracePeriodSeconds"] >= pause + 2 * options("kubernetes").drain


def test_probes():
    paths = {probe: container()[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/healthz", "readiness": "/readyz", "liveness": "/healthz"}


def test_what_is_written_is_writable():
    guard = COMPOSE["services"]["guard"]
    assert guard["read_only"] is True
    assert options("compose").audit.startswith("/app/runs/")
    assert guard["environment"]["JAX_COMPILATION_CACHE_DIR"].startswith("/app/runs/")
    service = unit()["Service"]
    assert options("systemd").audit.startswith(f"/var/log/{service['LogsDirectory']}/")
    assert f"JAX_COMPILATION_CACHE_DIR=/var/cache/{service['CacheDirectory']}" in service["Environment"].split()
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container()["volumeMounts"]}
    assert {path for path, read_only in mounts.items() if not read_only} == {"/cache", "/tmp"}
    assert {"name": "JAX_COMPILATION_CACHE_DIR", "value": "/cache"} in container()["env"]


def test_xla_may_write_code():
    service = unit()["Service"]
    assert "MemoryDenyWriteExecute" not in service
    assert {name: service[name] for name in ("NoNewPrivileges", "DynamicUser", "ProtectSystem")} == {
        "NoNewPrivileges": "yes",
        "DynamicUser": "yes",
        "ProtectSystem": "strict",
    }


def test_dashboard_and_autoscaler_know_the_metrics():
    known = metrics()
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    [query] = [each["query"]["query"] for each in DASHBOARD["templating"]["list"] if each["name"] == "job"]
    [rule] = yaml.safe_load((FOLDER / "prometheus/adapter.yaml").read_text("utf-8"))["rules"]["custom"]
    [metric] = KUBERNETES["HorizontalPodAutoscaler"]["spec"]["metrics"]
    scaled = metric["pods"]["metric"]["name"]
    assert rule["seriesQuery"].startswith(scaled + "{")
    assert "by (<<.GroupBy>>)" in rule["metricsQuery"]
    for text in [*expressions, query, scaled]:
        names = set(re.findall(r"jaxguard_\w+", text))
        assert names, text
        assert names <= known.keys(), text
        labels = {label.strip() for group in re.findall(r"by \(([^)]*)\)", text) for label in group.split(",")}
        labels |= set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', text))
        assert labels <= set().union(*(known[name] for name in names)), text
    shown = {
        re.sub(r"_(bucket|sum|count)$", "", name) for text in expressions for name in re.findall(r"jaxguard_\w+", text)
    }
    missing = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known} - shown
    assert not missing, f"no panel shows {missing}"


def test_the_monitor_scrapes_the_pods():
    monitor = yaml.safe_load((FOLDER / "prometheus/podmonitor.yaml").read_text("utf-8"))["spec"]
    pod = KUBERNETES["Deployment"]["spec"]["template"]
    assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    [endpoint] = monitor["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == (container()["ports"][0]["name"], "/metrics")
    assert KUBERNETES["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "guard"
    assert "replicas" not in KUBERNETES["Deployment"]["spec"], "applying the manifest would undo the autoscaler"


def test_panels_do_not_overlap():
    cells = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        own = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}
        assert grid["x"] + grid["w"] <= 24
        assert not own & cells, panel["title"]
        cells |= own


def test_compose_has_its_files_and_digests():
    for name, config in COMPOSE["configs"].items():
        assert (FOLDER / config["file"]).is_file() if "file" in config else yaml.safe_load(config["content"]), name
    for name, service in COMPOSE["services"].items():
        assert name == "guard" or "@sha256:" in service["image"]
        assert service["cap_drop"] == ["ALL"]
