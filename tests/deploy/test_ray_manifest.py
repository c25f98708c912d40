"""deploy/ray: the job agrees with Kubernetes' schemas, the script, its image and its packages.

No package has KubeRay's schema. So the pods in the RayJob are validated as pods, and the rest is
compared with KubeRay's documentation.
"""

import re
import shlex

import kubernetes_validate
import pytest
import yaml
from commands import ROOT
from test_deploy import closure, dockerignore_lines, ignored

import extract_features

RAY = ROOT / "deploy" / "ray"
JOB = yaml.safe_load((RAY / "rayjob.yaml").read_text())
CLUSTER = JOB["spec"]["rayClusterSpec"]
PODS = [
    CLUSTER["headGroupSpec"]["template"],
    *(group["template"] for group in CLUSTER["workerGroupSpecs"]),
]
DOCKERFILE = (RAY / "Dockerfile").read_text()


@pytest.mark.parametrize("version", ["1.27", "1.37"])
@pytest.mark.parametrize("pod", PODS, ids=["head", "worker"])
def test_a_pod_of_the_cluster_fits_kubernetes_schema(pod, version):
    document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **pod}
    assert kubernetes_validate.validate(document, version, strict=True) == version


def test_kuberay_knows_every_field_of_the_job():
    assert (JOB["apiVersion"], JOB["kind"]) == ("ray.io/v1", "RayJob")
    assert set(JOB["spec"]) <= {
        "entrypoint",
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "backoffLimit",
        "rayClusterSpec",
    }
    assert set(CLUSTER) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    for group in (CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_the_script_accepts_the_command():
    python, script, *flags = shlex.split(JOB["spec"]["entrypoint"])
    args = extract_features.parse_args(flags)
    assert (python, script, args.ray) == ("python", "extract_features.py", "auto")
    assert args.data_dir.startswith("s3://") and args.output_file.startswith("s3://")


def test_the_version_of_ray_is_the_required_version():
    requirements = (ROOT / "requirements/ray.txt").read_text()
    assert CLUSTER["rayVersion"] == re.search(r"^ray\[.*\]==(\S+)$", requirements, re.M)[1]


def test_the_pods_have_the_user_and_the_cache_of_the_image():
    user = re.search(r"^USER (\d+):", DOCKERFILE, re.MULTILINE)[1]
    assert all(pod["spec"]["securityContext"]["runAsUser"] == int(user) for pod in PODS)
    cache = re.search(r"CLIP_CACHE=(\S+)", DOCKERFILE)[1]
    mounts = PODS[0]["spec"]["containers"][0]["volumeMounts"]
    assert cache in [mount["mountPath"] for mount in mounts]


def test_the_image_copies_every_module_that_the_command_imports():
    lines = dockerignore_lines()
    assert "COPY *.py ./" in DOCKERFILE and "COPY detector detector" in DOCKERFILE
    assert not any(ignored(path, lines) for path in closure("extract_features.py"))
    assert not ignored("requirements/ray.txt", lines)
