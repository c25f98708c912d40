"""Rules, alerts, dashboard and autoscaler.

promtool checks their numbers. Their names are compared with the metrics that the service exports.
"""

import json
import re
import shutil
import subprocess

import numpy as np
import prometheus_client
import pytest
import yaml
from commands import ROOT
from engines import upload
from live import ready_client
from made_up import SHIPPED
from prometheus_client.parser import text_string_to_metric_families
from promql import groupings, resolve, selectors

from detector.base.files import sha256
from detector.evaluation import golden
from detector.features.file import load_features
from detector.model.file import load_model
from detector.model.score import decision
from detector.service.telemetry import BINS, Drift

DEPLOY = ROOT / "deploy"
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus-rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
PANELS = {panel["id"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"}
(ADAPTER,) = yaml.safe_load((DEPLOY / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
EXPRESSIONS = {
    **{rule.get("alert") or rule["record"]: rule["expr"] for rule in RULES},
    **{
        f"panel {panel['title']} {target['refId']}": target["expr"]
        for panel in PANELS.values()
        for target in panel["targets"]
    },
    "adapter series": ADAPTER["seriesQuery"],
    "adapter query": ADAPTER["metricsQuery"],
}
# Shown by a recording rule, or by another series of the same histogram, or not worth a panel.
HIDDEN = {
    "detector_scores_total",
    "detector_reference_share",
    "detector_feature_distance",
    "detector_confidence_sum",
    "detector_confidence_count",
    "detector_request_seconds_sum",
    "detector_request_seconds_count",
    "detector_stage_seconds_bucket",
    "detector_golden_images",
    "detector_golden_errors",
    "detector_golden_run_timestamp_seconds",
}
SCRAPED = {"namespace", "pod", "instance"}  # labels that Prometheus adds to every series of a pod


def promtool(*arguments):
    if shutil.which("promtool") is None:
        pytest.skip(
            "promtool is not installed: apt-get install prometheus, or"
            " github.com/prometheus/prometheus/releases"
        )
    return subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


# ---- numbers ----


def test_the_rules_are_valid():
    done = promtool("check", "rules", DEPLOY / "prometheus-rules.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(RULES)} rules found" in done.stdout


@pytest.mark.parametrize("name", ["prometheus-rules-test.yaml", "prometheus-alerts-test.yaml"])
def test_the_rules_compute_and_alert_as_they_should(name):
    done = promtool("test", "rules", DEPLOY / name)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_in_a_test_and_every_recording_rule_is_used():
    text = "".join(
        (DEPLOY / name).read_text()
        for name in ("prometheus-rules-test.yaml", "prometheus-alerts-test.yaml")
    )
    assert set(ALERTS) == set(re.findall(r'alertname="(\w+)"', text))
    used = {name for rule in RULES for name, _ in selectors(rule["expr"])} | set(
        re.findall(r"[a-z_]+:[\w:]+", text)
    )
    assert RECORDED <= used


def test_every_expression_of_dashboard_and_autoscaler_is_promql(tmp_path):
    rules = [
        {"record": f"e{i}", "expr": resolve(expression)}
        for i, expression in enumerate(EXPRESSIONS.values())
    ]
    (tmp_path / "rules.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]})
    )
    done = promtool("check", "rules", "--lint=none", tmp_path / "rules.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_names_the_first_step(name):
    alert = ALERTS[name]
    assert alert["labels"].keys() == {"severity"} and alert["labels"]["severity"] in (
        "critical",
        "warning",
        "info",
    )
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert re.search(r"\bfirst\b", alert["annotations"]["description"], re.I)
    for path in re.findall(r"\b\w+\.py\b", alert["annotations"]["description"]):
        assert (ROOT / path).is_file()


def test_every_alert_links_to_its_section_of_the_runbook_and_every_section_has_an_alert():
    headings = re.findall(r"^## (Detector\w+)$", (ROOT / "docs/runbook.md").read_text(), re.M)
    assert sorted(headings) == sorted(ALERTS)
    for name, alert in ALERTS.items():
        address, _, anchor = alert["annotations"]["runbook_url"].partition("#")
        assert address.endswith("/docs/runbook.md") and anchor == name.lower()


def test_one_command_moves_all_links_to_a_team_s_own_address(tmp_path):
    text = (DEPLOY / "prometheus-rules.yaml").read_text()
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy/prometheus-rules.yaml").write_text(text)
    (command,) = re.findall(r"^# CHANGE: `runbook_url`.*\n# (sed .*)$", text, re.M)
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    moved = yaml.safe_load((tmp_path / "deploy/prometheus-rules.yaml").read_text())
    rules = [rule for group in moved["groups"] for rule in group["rules"] if "alert" in rule]
    assert len(rules) == len(ALERTS)
    for rule in rules:
        address = rule["annotations"]["runbook_url"]
        assert address.startswith("https://YOUR.ADDRESS/docs/runbook.md#")


CODE = "".join((ROOT / f"detector/service/{name}.py").read_text() for name in ("app", "engine"))


def test_the_events_that_alerts_name_are_logged():
    text = "".join(alert["annotations"]["description"] for alert in ALERTS.values())
    events = re.findall(r'event "(\w+)"', text)
    events += re.findall(r'"event": "(\w+)"', (ROOT / "docs/runbook.md").read_text())
    for event in events:
        assert re.search(rf'say_event\(\s*"{event}"', CODE)


def test_the_command_for_the_operator_wraps_the_rules():
    head = re.findall(r"^#   (.*)", (DEPLOY / "prometheus-rules.yaml").read_text(), re.M)
    assert head[-1].endswith("| kubectl -n detector apply -f -")
    done = subprocess.run(
        ["sh", "-c", "\n".join(head).replace("kubectl -n detector apply -f -", "cat")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    wrapped = yaml.safe_load(done.stdout)
    assert (wrapped["kind"], wrapped["apiVersion"]) == (
        "PrometheusRule",
        "monitoring.coreos.com/v1",
    )
    assert [rule for group in wrapped["spec"]["groups"] for rule in group["rules"]] == RULES


# ---- names ----


@pytest.fixture(scope="module")
def service(tmp_path_factory, photos):
    """A client after verdicts, refused images, a missing token, feedback and a failed reload."""
    keys = tmp_path_factory.mktemp("keys") / "api-keys"
    keys.write_text(f"mine {sha256(b'token')}\n")
    client = ready_client(API_KEYS_FILE=str(keys), REVIEW_LOW="0.2", REVIEW_HIGH="0.8")
    assert upload(client, "/classify", b"").status_code == 401
    client.environ_base["HTTP_AUTHORIZATION"] = "Bearer token"
    photo = photos["china.jpg"].read_bytes()
    assert upload(client, "/classify", photo).status_code == 200
    assert upload(client, "/classify", b"no image").status_code == 415
    assert client.post("/feedback", json={"request_id": "a", "label": "real"}).status_code == 200
    keys.write_text("broken\n")
    client.application.extensions["engine"]._reload()
    return client


@pytest.fixture(scope="module")
def scraped(service):
    """What Prometheus gets: {series name: [its label sets]}; [] for a counter without series."""
    series = {}
    for family in text_string_to_metric_families(service.get("/metrics").text):
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(
            family.type, [""]
        )
        series |= {family.name + end: [] for end in ends}
        for sample in family.samples:
            series.setdefault(sample.name, []).append(sample.labels)
    return series


@pytest.fixture(scope="module")
def pushed():
    """What golden.py pushes: {metric: [label sets]}."""
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            prometheus_client, "push_to_gateway", lambda *_, registry, **__: sent.append(registry)
        )
        golden.push(
            "http://nowhere",
            {"v1": {"real": [(True, 0)], "fake": [(False, 1)], "errors": 0}},
            {"v1": 0.5},
            False,
        )
    return {
        family.name: [sample.labels for sample in family.samples]
        for registry in sent
        for family in registry.collect()
    }


@pytest.fixture(scope="module")
def known(scraped, pushed):
    return {**scraped, **pushed, **{name: [] for name in RECORDED}}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_metric_in_an_expression_exists(name, known):
    named = {metric for metric, _ in selectors(resolve(EXPRESSIONS[name]))}
    assert named and named <= set(known)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_label_in_an_expression_exists_and_can_have_its_value(name, known, service):
    routes = {rule.rule for rule in service.application.url_map.iter_rules()}
    for metric, matchers in selectors(resolve(EXPRESSIONS[name])):
        for label, _, value in matchers:
            values = {labels[label] for labels in known[metric] if label in labels}
            assert values or label in SCRAPED, f"{metric} has no label {label}"
            if label == "route":
                assert set(value.split("|")) <= routes
            elif label != "status" and label not in SCRAPED:
                assert all(one in values or f'"{one}"' in CODE for one in value.split("|")), (
                    f"{label} is never {value}"
                )
            else:
                re.compile(value)


def labels_of(metric, known):
    """Labels by which a series may be grouped; a recorded series has those of its expression."""
    if metric in RECORDED:
        inner = (labels_of(name, known) for name, _ in selectors(EXPRESSIONS[metric]))
        return set().union(*inner, groupings(EXPRESSIONS[metric]))
    return set().union(*known[metric])


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_label_in_a_grouping_exists(name, known):
    expression = resolve(EXPRESSIONS[name])
    replaced = set(re.findall(r'label_replace\([^,]+, "(\w+)"', expression))
    has = set().union(*(labels_of(metric, known) for metric, _ in selectors(expression)))
    assert groupings(expression) <= has | SCRAPED | replaced


def test_selectors_and_groupings_are_read_from_promql():
    expression = (
        'sum by (a) (rate(x_total{b="1",c=~"2|3"}[5m])) / ignoring (d) group_left () y:z:w offset'
        ' 1w > 1.5e3 unless on (e) label_replace(v, "f", "$1", "g", "(.+)") and absent(u == 1)'
    )
    assert selectors(expression) == [
        ("x_total", [("b", "=", "1"), ("c", "=~", "2|3")]),
        ("y:z:w", []),
        ("v", []),
        ("u", []),
    ]
    assert groupings(expression) == {"a", "d", "e"}


# ---- dashboard ----


def test_the_dashboard_can_be_imported_and_uses_its_variables():
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and "id" not in DASHBOARD
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in PANELS.values():
        assert panel["datasource"]["uid"] == "${datasource}" and panel["targets"]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"]))) - {"__rate_interval"}
    assert used == set(variables)


def test_no_panel_overlaps_another():
    taken = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["id"]) == panel["id"]


def test_thresholds_on_panels_are_those_of_the_alerts():
    for title, alert in (
        ("p95, /classify", "DetectorSlow"),
        ("Latency, /classify", "DetectorSlow"),
        ("Refused uploads", "DetectorRejecting"),
        ("PSI since last week", "DetectorDriftSinceLastWeek"),
        ("Population stability index", "DetectorDriftFromTraining"),
        ("Feature distance", "DetectorUnknownImages"),
    ):
        (panel,) = (panel for panel in PANELS.values() if panel["title"] == title)
        limit = float(re.search(r"> ([\d.]+)", ALERTS[alert]["expr"])[1])
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"][-1]["value"] == limit


def test_every_metric_of_ours_has_a_panel(scraped, pushed):
    shown = {
        metric
        for name, expression in EXPRESSIONS.items()
        if name.startswith("panel ")
        for metric, _ in selectors(resolve(expression))
    }
    assert {
        name for name in RECORDED if name.startswith("fleet:") and "scores" not in name
    } <= shown
    hidden = {name for name in {*scraped, *pushed} if name.startswith("detector_")} - shown
    assert hidden == HIDDEN, "a metric without a panel"


# ---- thresholds ----


def limits(alert):
    return [float(value) for value in re.findall(r"(?:>=?) ([\d.]+)", ALERTS[alert]["expr"])]


def psi(counts, expected):
    """As the recording rule computes it: half a verdict added to each bin."""
    live = (counts + 0.5) / (counts + 0.5).sum(-1, keepdims=True)
    return ((live - expected) * np.log(live / expected)).sum(-1)


def test_the_least_number_of_verdicts_does_not_alert_by_chance():
    """20,000 draws without drift."""
    rng, even = np.random.default_rng(0), np.full(BINS, 1 / BINS)
    limit, least = limits("DetectorDriftFromTraining")
    assert psi(rng.multinomial(int(least), even, 20_000), even).max() < limit
    limit, least, before = limits("DetectorDriftSinceLastWeek")
    now, then = (rng.multinomial(int(n), even, 20_000) for n in (least, before))
    assert psi(now, (then + 0.5) / (then + 0.5).sum(-1, keepdims=True)).max() < limit


@pytest.fixture(scope="module")
def columns():
    return load_features(SHIPPED.parent / "features.npz")


@pytest.fixture(scope="module")
def stream(columns):
    """Function: rows of the shipped features -> (feature distance, PSI) after 400 draws of them."""
    model, rng = load_model(SHIPPED), np.random.default_rng(0)

    def run(chosen):
        drift, images = Drift(model), np.flatnonzero(chosen & (columns["view"] == 0))
        rows = columns["features"][rng.choice(images, 400)]
        for row in rows:
            drift.add(row)
        bins = [drift.bin(score) for score in decision(model, rows)]
        return drift.distance(), psi(np.bincount(bins, minlength=BINS), drift.reference)

    return run


def test_known_images_stay_below_the_alert_and_most_unseen_sources_exceed_it(columns, stream):
    (limit,) = limits("DetectorUnknownImages")
    sources = np.unique(columns["sources"][columns["splits"] == "external"])
    unseen = [stream(columns["sources"] == source)[0] for source in sources]
    known = np.array([stream(columns["splits"] == "test") for _ in range(10)])
    assert known[:, 0].max() < 0.9 * limit
    assert known[:, 1].max() < 0.9 * limits("DetectorDriftFromTraining")[0]
    assert len(unseen) == 18 and sum(distance > limit for distance in unseen) >= 15
