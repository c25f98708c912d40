"""The Kubernetes manifests agree with Kubernetes' schemas, the service, its image and golden.py."""

import ast
import json
import os
import re
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml
from commands import ROOT
from live import DEMO
from test_deploy import PREPARED, closure, environment, uncopied, values

import golden
from detector.service import app as service_app
from detector.service.settings import SETTINGS, read_settings

DEPLOY = ROOT / "deploy"
KUSTOMIZATION = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())
DOCUMENTS = [
    document
    for name in KUSTOMIZATION["resources"]
    for document in yaml.safe_load_all((DEPLOY / name).read_text())
]
# The first version that knows all fields without a feature gate, and the newest schema.
VERSIONS = ("1.27", "1.37")
PRIVATE = {"/metrics", "/healthz", "/readyz"}
HTTP_METHODS = {"GET", "POST"}


def find(kind, name="detector"):
    return next(d for d in DOCUMENTS if (d["kind"], d["metadata"]["name"]) == (kind, name))


POD = find("Deployment")["spec"]["template"]
GOLDEN = find("CronJob", "detector-golden")["spec"]["jobTemplate"]["spec"]["template"]
LABELS = POD["metadata"]["labels"]
(MAIN,) = POD["spec"]["containers"]
(INIT,) = POD["spec"]["initContainers"]
(JOB,) = GOLDEN["spec"]["containers"]
CONFIG = {
    maker["name"]: dict(literal.split("=", 1) for literal in maker["literals"])
    for maker in KUSTOMIZATION["configMapGenerator"]
}
ENV = {entry["name"]: entry["value"] for entry in MAIN["env"]}
ANNOTATIONS = find("Ingress")["metadata"]["annotations"]


@pytest.fixture(scope="module")
def routes():
    app = service_app.create_app(DEMO)
    return {rule.rule: rule.methods & HTTP_METHODS for rule in app.url_map.iter_rules()}


# ---- schemas ----


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda d: f"{d['kind']} {d['metadata']['name']}"
)
def test_a_manifest_fits_kubernetes_schema(document, version):
    assert kubernetes_validate.validate(document, version, strict=True) == version


def test_every_manifest_is_applied_except_for_the_operator():
    for path in DEPLOY.glob("*.yaml"):
        versions = {
            document.get("apiVersion", "") for document in yaml.safe_load_all(path.read_text())
        }
        # Prometheus' own files have no version.
        others = {"", KUSTOMIZATION["apiVersion"], "monitoring.coreos.com/v1"}
        assert (path.name in KUSTOMIZATION["resources"]) == bool(versions - others)


def test_the_manifests_use_the_names_of_the_kustomization():
    assert {image["name"] for image in KUSTOMIZATION["images"]} == {MAIN["image"], JOB["image"]}
    used = set(
        re.findall(r"configMap\w+': \{(?:'key': '\w+', )?'name': '([\w-]+)'", str(DOCUMENTS))
    )
    assert used == set(CONFIG)
    key = INIT["env"][0]["valueFrom"]["configMapKeyRef"]["key"]
    assert key in CONFIG["detector-model"]
    assert find("Namespace")["metadata"]["name"] == KUSTOMIZATION["namespace"]


if shutil.which("kubectl"):  # not in our requirements, so only where it is installed

    def test_the_output_of_kubectl_is_valid_and_complete():
        done = subprocess.run(
            ["kubectl", "kustomize", DEPLOY], capture_output=True, text=True, check=True
        )
        built = list(yaml.safe_load_all(done.stdout))
        for document in built:
            kubernetes_validate.validate(document, VERSIONS[-1], strict=True)
            assert (
                document["kind"] == "Namespace"
                or document["metadata"]["namespace"] == KUSTOMIZATION["namespace"]
            )
        names = {
            document["metadata"]["name"] for document in built if document["kind"] == "ConfigMap"
        }
        assert len(names) == len(CONFIG) and all(done.stdout.count(name) == 2 for name in names)
        (image,) = KUSTOMIZATION["images"]
        assert set(re.findall(r"image: (\S+)", done.stdout)) == {
            f"{image['newName']}:{image['newTag']}",
            INIT["image"],
        }


@pytest.mark.parametrize(
    "image", [INIT["image"], *(f"{i['newName']}:{i['newTag']}" for i in KUSTOMIZATION["images"])]
)
def test_an_image_has_a_version(image):
    assert re.search(r":v?\d+\.\d+\.\d+$|@sha256:[0-9a-f]{64}$", image)


# ---- the service ----


def test_the_service_accepts_every_setting():
    given = {**CONFIG["detector-settings"], **ENV}
    assert set(given) <= set(SETTINGS)
    read_settings(given)
    assert {source["configMapRef"]["name"] for source in MAIN["envFrom"]} == {"detector-settings"}


def test_the_service_has_keys_and_a_pinned_model_that_is_no_demonstration():
    assert ENV["ALLOW_DEMO_MODEL"] == "0" and ENV["HOST"] == "0.0.0.0"
    assert ENV["MODEL_SHA256_FILE"] == ENV["MODEL_PATH"] + ".sha256" and ENV["API_KEYS_FILE"]


def test_the_files_of_the_settings_are_mounted_read_only():
    mounts = {mount["mountPath"]: mount for mount in MAIN["volumeMounts"]}
    for name in ("MODEL_PATH", "MODEL_SHA256_FILE", "API_KEYS_FILE"):
        assert mounts[os.path.dirname(ENV[name])]["readOnly"]
    (keys,) = (
        volume["secret"]
        for volume in POD["spec"]["volumes"]
        if volume["name"] == mounts["/keys"]["name"]
    )
    assert os.path.basename(ENV["API_KEYS_FILE"]) in [item["path"] for item in keys["items"]]
    context = POD["spec"]["securityContext"]
    assert keys["defaultMode"] == 0o440 and context["fsGroup"] == context["runAsGroup"]


def test_the_init_container_downloads_the_model_and_its_hash(tmp_path):
    """Runs its script with a stand-in for curl that writes the address."""
    (mount,) = INIT["volumeMounts"]
    assert INIT["workingDir"] == mount["mountPath"] == os.path.dirname(ENV["MODEL_PATH"])
    assert not mount.get("readOnly")
    source, target = CONFIG["detector-model"][INIT["env"][0]["name"]], tmp_path / "models"
    target.mkdir()
    (tmp_path / "curl").write_text(
        '#!/bin/sh\n[ "${*#*--fail*--proto =https}" != "$*" ] || exit 1\n'
        'while [ "$1" != --output ]; do shift; done\necho "$3" > "$2"\n'
    )
    (tmp_path / "curl").chmod(0o755)
    subprocess.run(
        [*INIT["command"], *INIT["args"]],
        cwd=target,
        check=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL_URL": source},
    )
    assert {path.name: path.read_text().strip() for path in target.iterdir()} == {
        os.path.basename(ENV["MODEL_PATH"]): source,
        os.path.basename(ENV["MODEL_SHA256_FILE"]): source + ".sha256",
    }


def test_the_init_container_fails_where_the_download_does(tmp_path):
    (tmp_path / "curl").write_text("#!/bin/sh\nexit 22\n")
    (tmp_path / "curl").chmod(0o755)
    done = subprocess.run(
        [*INIT["command"], *INIT["args"]],
        cwd=tmp_path,
        capture_output=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL_URL": "https://x"},
    )
    assert done.returncode == 22


# ---- ports, probes, ends ----


def test_ports_agree_everywhere(routes):
    (port,) = MAIN["ports"]
    assert (
        str(port["containerPort"])
        == ENV["PORT"]
        == POD["metadata"]["annotations"]["prometheus.io/port"]
    )
    assert POD["metadata"]["annotations"]["prometheus.io/path"] in routes
    (entry,) = find("Service")["spec"]["ports"]
    monitor = yaml.safe_load((DEPLOY / "servicemonitor.yaml").read_text())["spec"]
    assert entry["targetPort"] == port["name"] and entry["name"] == monitor["endpoints"][0]["port"]
    assert monitor["endpoints"][0]["path"] in routes
    assert (
        monitor["selector"]["matchLabels"].items() <= find("Service")["metadata"]["labels"].items()
    )


@pytest.mark.parametrize(
    "probe, path",
    [("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")],
)
def test_a_probe_asks_the_right_route(probe, path, routes):
    assert MAIN[probe]["httpGet"] == {"path": path, "port": MAIN["ports"][0]["name"]}
    assert "GET" in routes[path]
    assert MAIN[probe]["timeoutSeconds"] <= MAIN[probe]["periodSeconds"]


def test_requests_in_flight_can_finish_before_the_pod_is_killed():
    code = ast.parse((ROOT / "gunicorn.conf.py").read_text())
    (graceful,) = (
        node.value.value
        for node in code.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "graceful_timeout"
    )
    sleep, seconds = MAIN["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    assert POD["spec"]["terminationGracePeriodSeconds"] > graceful + int(seconds)


def test_a_bad_model_stops_the_rollout_at_the_first_pod():
    spec = find("Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    startup = MAIN["startupProbe"]["periodSeconds"] * MAIN["startupProbe"]["failureThreshold"]
    assert startup < spec["progressDeadlineSeconds"]


# ---- security ----


@pytest.mark.parametrize("container", [MAIN, INIT, JOB], ids=["service", "init", "golden"])
def test_a_container_has_no_privileges(container):
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert not {"privileged", "runAsUser", "runAsNonRoot", "seccompProfile"} & set(context), (
        "the pod's settings hold"
    )


@pytest.mark.parametrize("pod", [POD, GOLDEN], ids=["service", "golden"])
def test_a_pod_runs_as_the_images_user_without_a_cluster_token(pod):
    spec, context = pod["spec"], pod["spec"]["securityContext"]
    user, group = map(int, values(PREPARED, "USER")[-1].split(":"))
    assert (context["runAsUser"], context["runAsGroup"]) == (user, group)
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert not any("hostPath" in volume for volume in spec["volumes"])
    labels = find("Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"


def test_no_secret_is_in_a_file():
    assert not [d for d in DOCUMENTS if d["kind"] == "Secret"]
    assert "secretGenerator" not in KUSTOMIZATION


def test_the_network_policies_allow_only_named_connections():
    policy, job = find("NetworkPolicy")["spec"], find("NetworkPolicy", "detector-golden")["spec"]
    service, golden_job = ({"matchLabels": pod["metadata"]["labels"]} for pod in (POD, GOLDEN))
    assert (policy["podSelector"], job["podSelector"]) == (service, golden_job)
    assert policy["policyTypes"] == job["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in job
    assert {"podSelector": golden_job} in policy["ingress"][0]["from"]
    assert {"podSelector": service} in [to for rule in job["egress"] for to in rule["to"]]
    for rule in policy["ingress"] + policy["egress"] + job["egress"]:
        assert rule["ports"] and (rule.get("from") or rule.get("to")), "open to all"
        for peer in rule.get("to", []):
            assert peer.get("ipBlock", {}).get("cidr", "/32").endswith("/32")


# ---- the ingress ----


def bytes_of(size):
    return int(size[:-1]) * {"k": 1 << 10, "m": 1 << 20}[size[-1]]


def test_the_ingress_has_only_the_public_routes(routes):
    (rule,) = find("Ingress")["spec"]["rules"]
    paths = {path["path"]: path for path in rule["http"]["paths"]}
    assert set(paths) == set(routes) - PRIVATE
    for path in paths.values():
        assert path["pathType"] == "Exact" and path["backend"] == {
            "service": {"name": "detector", "port": {"name": "http"}}
        }
    assert rule["host"] in find("Ingress")["spec"]["tls"][0]["hosts"]


@pytest.mark.parametrize(
    "body, buffer",
    [
        ("nginx.org/client-max-body-size", "nginx.org/client-body-buffer-size"),
        (
            "nginx.ingress.kubernetes.io/proxy-body-size",
            "nginx.ingress.kubernetes.io/client-body-buffer-size",
        ),
    ],
)
def test_the_ingress_has_the_services_body_limit_and_buffers_in_memory(body, buffer):
    limit = read_settings(CONFIG["detector-settings"])["MAX_UPLOAD_BYTES"]
    assert limit < bytes_of(ANNOTATIONS[body]) <= 1.2 * limit
    assert bytes_of(ANNOTATIONS[buffer]) >= bytes_of(ANNOTATIONS[body])


def test_both_controllers_have_the_same_limits():
    f5, community = (
        {key.split("/")[1]: value for key, value in ANNOTATIONS.items() if key.startswith(prefix)}
        for prefix in ("nginx.org/", "nginx.ingress.kubernetes.io/")
    )
    for name in ("proxy-connect-timeout", "proxy-send-timeout", "proxy-read-timeout"):
        assert f5[name] == community[name] + "s"
    assert f5["limit-req-rate"] == community["limit-rps"] + "r/s"
    rate, factor = int(community["limit-rps"]), int(community["limit-burst-multiplier"])
    assert int(f5["limit-req-burst"]) == rate * factor
    assert community["proxy-request-buffering"] == "on"
    queue_timeout = read_settings(CONFIG["detector-settings"])["QUEUE_TIMEOUT_S"]
    assert int(community["proxy-read-timeout"]) > 2 * queue_timeout


# ---- the number of pods ----


def test_requests_equal_limits_in_whole_processors():
    for container in (MAIN, INIT, JOB):
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert MAIN["resources"]["limits"]["cpu"].isdigit()


def test_all_selectors_select_these_pods():
    assert find("Service")["spec"]["selector"] == LABELS != GOLDEN["metadata"]["labels"]
    selectors = [find(kind)["spec"]["selector"] for kind in ("Deployment", "PodDisruptionBudget")]
    selectors += [spread["labelSelector"] for spread in POD["spec"]["topologySpreadConstraints"]]
    assert all(selector["matchLabels"] == LABELS for selector in selectors)


def test_the_autoscaler_sets_the_number_and_has_a_fallback():
    scaler = find("HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": "detector",
    }
    assert "replicas" not in find("Deployment")["spec"] and scaler["minReplicas"] >= 2
    waiting, processors = scaler["metrics"]
    (rule,) = yaml.safe_load((DEPLOY / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert waiting["pods"]["metric"]["name"] == rule["name"]["as"]
    assert processors["resource"]["name"] == "cpu"
    assert processors["resource"]["target"]["averageUtilization"] < 100


# ---- golden images ----


def test_golden_py_accepts_the_command_of_the_golden_job(monkeypatch):
    monkeypatch.setattr(golden, "need_folder", lambda path: None)  # it is a volume of the pod
    assert [*JOB["command"]] == ["python", "golden.py"] and JOB["image"] == MAIN["image"]
    job = find("CronJob", "detector-golden")["spec"]["jobTemplate"]["spec"]
    # A low accuracy is no reason to run again.
    assert (job["backoffLimit"], GOLDEN["spec"]["restartPolicy"]) == (0, "Never")
    args = golden.parse_args(JOB["args"])
    assert args.url == f"http://{find('Service')['metadata']['name']}"
    assert find("Service")["spec"]["ports"][0]["port"] == 80
    (mount,) = JOB["volumeMounts"]
    assert args.data_dir == mount["mountPath"] and mount["readOnly"]
    claim = GOLDEN["spec"]["volumes"][0]["persistentVolumeClaim"]
    assert claim["readOnly"] and find("PersistentVolumeClaim", claim["claimName"])
    port = int(args.pushgateway.rsplit(":", 1)[1])
    egress = find("NetworkPolicy", "detector-golden")["spec"]["egress"]
    assert port in [entry["port"] for rule in egress for entry in rule["ports"]]


def test_golden_py_reads_the_token_of_the_golden_job():
    (entry,) = JOB["env"]
    assert f'environ.get("{entry["name"]}"' in (ROOT / "golden.py").read_text()
    (keys,) = (
        volume["secret"]["secretName"] for volume in POD["spec"]["volumes"] if "secret" in volume
    )
    assert entry["valueFrom"]["secretKeyRef"]["name"] == keys


def test_the_image_has_golden_py_and_its_imports():
    assert uncopied(closure("golden.py"), PREPARED) == []


def test_the_image_sets_the_cache_of_its_encoder():
    assert "CLIP_CACHE" in environment(PREPARED) and "CLIP_CACHE" not in ENV
    assert json.loads(values(PREPARED, "CMD")[-1]) == ["python", "app.py"]
    assert "command" not in MAIN
