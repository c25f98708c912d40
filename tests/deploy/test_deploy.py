"""Dockerfile, .dockerignore and workflow agree with the repository."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from fnmatch import fnmatchcase

import pytest
import yaml
from commands import ROOT

sys.path.insert(0, str(ROOT / "deploy"))
from check_image import read_dockerfile, read_env, read_stages, steps_of

from detector.encoders.runtime import clip_model_of
from detector.model.file import load_model
from detector.service.settings import SETTINGS

INSTRUCTIONS = read_dockerfile(ROOT / "Dockerfile")
DEMO = steps_of(read_stages(INSTRUCTIONS))
PREPARED = steps_of(read_stages(INSTRUCTIONS, CLIP_MODEL="ViT-L/14"))
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
# Imported inside functions, for CUDA, a ResNet or timm. The image does not have them.
PREPARING = {"torch", "clip", "timm"}
OPTIONAL = {"c2pa"}  # without it, details say so
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif", ".bmp", ".tif", ".tiff", ".heic"}


def values(instructions, keyword):
    return [value for name, value in instructions if name == keyword]


def copied(instructions):
    """All sources of COPY in the repository."""
    return [
        source
        for value in values(instructions, "COPY")
        if not value.startswith("--from")
        for source in value.split()[:-1]
    ]


def files_below(path):
    """Files of a folder, or the file; not the bytecode that Python leaves beside them."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [p for p in files if p.is_file() and "__pycache__" not in p.parts]


def requirements(name):
    """Names in a requirements file and in the files that it includes, in lower case."""
    names = set()
    for line in (ROOT / name).read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            names |= requirements(line[3:])
        elif line:
            names.add(re.match(r"[\w.-]+", line)[0].lower())
    return names


def imports(path):
    """(module, is it imported with the file?) of each import, without imports that may fail."""

    def walk(node, needed):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], needed) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            ours = node.module.startswith("detector")
            yield node.module if ours else node.module.split(".")[0], needed
            yield from ((f"{node.module}.{alias.name}", needed) for alias in node.names if ours)
        elif (
            isinstance(node, ast.Try)
            and needed
            and any("ImportError" in ast.unparse(h) for h in node.handlers)
        ):
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, needed and not isinstance(node, (ast.FunctionDef, ast.Lambda)))

    return set(walk(ast.parse(path.read_text()), True))


def closure(*files):
    """Our own files that these files import, directly or not: {path: its imports}."""
    known, todo = {}, list(files)
    while todo:
        path = todo.pop()
        if path not in known and (ROOT / path).is_file():
            known[path] = imports(ROOT / path)
            todo += [f"{module.replace('.', '/')}.py" for module, _ in known[path]]
    return known


def uncopied(files, steps):
    """Our files that no COPY takes."""
    sources = copied(steps)

    def is_copied(file):
        return any(file == source or file.startswith(f"{source}/") for source in sources)

    return [file for file in files if not is_copied(file)]


def ignored(path, lines):
    """Does .dockerignore leave this file out?

    The last pattern that fits the file or a folder above it decides. Patterns have no `**`.
    """
    out = False
    for line in lines:
        pattern = line.removeprefix("!").strip("/").split("/")
        above = path.split("/")[: len(pattern)]
        if len(above) == len(pattern) and all(map(fnmatchcase, above, pattern)):
            out = not line.startswith("!")
    return out


def dockerignore_lines():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def dockerignore():
    lines = dockerignore_lines()
    assert not any("**" in line for line in lines)
    return lines


# ---- paths ----


@pytest.mark.parametrize("source", copied(INSTRUCTIONS))
def test_copied_files_exist_and_neither_git_nor_docker_ignores_them(source, dockerignore):
    assert (ROOT / source).exists(), f"COPY {source}: no such file"
    for path in files_below(ROOT / source):
        name = path.relative_to(ROOT).as_posix()
        assert not ignored(name, dockerignore), f".dockerignore leaves {name} out"
        check = subprocess.run(["git", "-C", ROOT, "check-ignore", "-q", name])
        assert check.returncode != 0, f"git ignores {name}"


@pytest.mark.parametrize(
    "path",
    [
        ".git/HEAD",
        ".venv/bin/python",
        ".venv-demo/bin/python",
        "demo/features.npz",
        "tests/conftest.py",
        "model.joblib",
        "features.npz",
        "data/train/real/1.jpg",
        "runs/small.pt",
        "models/features.npz",
        "models/baseline_report/roc.png",
        ".env",
    ],
)
def test_other_files_stay_out_of_the_build(path, dockerignore):
    assert ignored(path, dockerignore)


def test_no_image_file_is_copied():
    files = [path for source in copied(INSTRUCTIONS) for path in files_below(ROOT / source)]
    assert not [path for path in files if path.suffix.lower() in PICTURES]


@pytest.mark.parametrize("steps", [DEMO, PREPARED], ids=["demo", "prepared"])
def test_every_module_that_the_service_imports_is_copied(steps):
    needed = closure("app.py", "gunicorn.conf.py")
    assert "detector/service/app.py" in needed and uncopied(needed, steps) == []


def test_every_module_that_prepares_an_encoder_is_copied():
    steps = steps_of(read_stages(INSTRUCTIONS, CLIP_MODEL="ViT-L/14"), "encoder")
    assert uncopied(closure("prepare_clip.py"), steps) == []


@pytest.mark.parametrize("steps", [DEMO, PREPARED], ids=["demo", "prepared"])
def test_the_page_and_the_openapi_document_are_copied(steps):
    files = ["detector/service/templates/index.html", "detector/service/openapi.json"]
    assert uncopied(files, steps) == []


def test_a_prepared_encoder_is_copied_to_the_cache():
    stages = read_stages(INSTRUCTIONS, CLIP_MODEL="ViT-L/14")
    (cache,) = {environment(steps_of(stages, name))["CLIP_CACHE"] for name in ("encoder", "serve")}
    assert f"--from=encoder {cache}/encoders " in " ".join(values(PREPARED, "COPY"))


# ---- packages ----


@pytest.mark.parametrize("steps", [DEMO, PREPARED], ids=["demo", "prepared"])
def test_the_image_installs_one_requirements_file_without_torch(steps):
    named = re.findall(r"-r (\S+)", " ".join(values(steps, "RUN")))
    assert named == ["requirements-serve.txt"]
    heavy = {name for name in requirements(named[0]) if re.match("torch|clip|nvidia", name)}
    assert not heavy, f"{named[0]} brings {heavy}"


def test_every_install_has_no_cache_and_has_its_files():
    for keyword, value in INSTRUCTIONS:
        if keyword == "RUN" and "pip install" in value:
            assert "--no-cache-dir" in value
    for name, (_, steps) in read_stages(INSTRUCTIONS, CLIP_MODEL="ViT-L/14").items():
        for file in re.findall(r"-r (\S+)", " ".join(values(steps, "RUN"))):
            included = re.findall(r"^-r (\S+)", (ROOT / file).read_text(), re.M)
            assert {file, *included} <= set(copied(steps)), name


def test_every_package_that_the_service_imports_is_installed():
    """By requirements-serve.txt, or as a requirement of such a package (werkzeug by flask)."""
    listed = requirements("requirements-serve.txt")
    brought = {
        re.match(r"[\w.-]+", need)[0].lower()
        for name in listed
        for need in importlib.metadata.requires(name) or ()
        if "extra ==" not in need
    }
    owners = importlib.metadata.packages_distributions()
    for file, modules in closure("app.py", "gunicorn.conf.py").items():
        for module, needed in modules:
            own = module in sys.stdlib_module_names or module.startswith("detector")
            if own or module in PREPARING | OPTIONAL and not needed:
                continue
            names = {name.lower().replace("_", "-") for name in owners.get(module, [module])}
            assert names & (listed | brought), f"{file} imports {module}, which is not in the image"


# ---- commands and settings ----


def environment(steps):
    return {name: value for line in values(steps, "ENV") for name, value in read_env(line).items()}


def test_the_image_starts_app_py():
    command = json.loads(values(DEMO, "CMD")[-1])
    assert command == ["python", "app.py"] == json.loads(values(PREPARED, "CMD")[-1])


def test_the_flags_of_the_preparation_exist():
    for script, flag in re.findall(
        r"python (\w+\.py) (--\w+)", " ".join(values(INSTRUCTIONS, "RUN"))
    ):
        assert f'"{flag}"' in (ROOT / script).read_text()


def test_the_health_check_needs_no_shell_and_its_route_exists():
    command = json.loads(values(DEMO, "HEALTHCHECK")[-1].split("CMD", 1)[1])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
    route = re.search(r"'(/\w+)'", command[2])[1]
    assert f'.get("{route}")' in (ROOT / "detector/service/app.py").read_text()


@pytest.mark.parametrize("steps", [DEMO, PREPARED], ids=["demo", "prepared"])
def test_every_variable_of_the_image_is_read(steps):
    code = "".join((ROOT / path).read_text() for path in closure("app.py"))
    for name in set(environment(steps)) - set(SETTINGS) - {"PYTHONDONTWRITEBYTECODE"}:
        assert f'environ.get("{name}"' in code, name
    assert environment(steps)["HOST"] == "0.0.0.0"
    assert values(steps, "EXPOSE") == [environment(steps)["PORT"]] == [SETTINGS["PORT"][0]]


def test_only_the_demonstration_allows_a_demo_model():
    assert environment(DEMO)["ALLOW_DEMO_MODEL"] == "1"
    assert environment(DEMO)["MODEL_PATH"] in copied(DEMO)
    assert "ALLOW_DEMO_MODEL" not in environment(PREPARED)
    assert not any(source.startswith("models") for source in copied(PREPARED))


@pytest.mark.parametrize("steps", [DEMO, PREPARED], ids=["demo", "prepared"])
def test_the_user_is_a_number_and_not_root(steps):
    assert re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", values(steps, "USER")[-1])


def test_the_demonstration_prepares_the_layers_of_the_shipped_model():
    encoder = load_model(ROOT / "models" / "baseline.joblib")["encoder"]
    prepare = " ".join(values(DEMO + steps_of(read_stages(INSTRUCTIONS), "encoder"), "RUN"))
    model, layers = clip_model_of(encoder), encoder["layers"]
    assert f'"${{CLIP_MODEL:-{model}}}" --layers "${{LAYERS:-{layers}}}"' in prepare


def test_the_commit_is_a_build_argument():
    assert "CODE_COMMIT" in [value.split("=")[0] for value in values(DEMO, "ARG")]
    assert environment(DEMO)["CODE_COMMIT"] == "${CODE_COMMIT}"


# ---- workflow ----


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load(WORKFLOW.read_text())


def test_the_workflow_has_two_jobs_and_each_step_uses_or_runs(workflow):
    assert set(workflow["jobs"]) == {"test", "image"}
    assert True in workflow, "PyYAML reads the key `on` as true"
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert set(step) <= {"name", "uses", "with", "run", "if", "env"}


def test_the_workflow_pins_its_actions(workflow):
    for job in workflow["jobs"].values():
        assert re.fullmatch(r"ubuntu-\d\d\.\d\d", job["runs-on"])
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", step["uses"])


def test_the_commands_of_the_workflow_exist(workflow):
    code = "\n".join(
        step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]
    )
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake (\S+)", code):
        assert re.search(rf"^{target}:", makefile, re.M), f"make {target}"
    assert "make test" in code
    arguments = {value.split("=")[0] for value in values(INSTRUCTIONS, "ARG")}
    assert set(re.findall(r"--build-arg (\w+)", code)) <= arguments
    app = (ROOT / "detector/service/app.py").read_text()
    for port, route in re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", code):
        assert port == SETTINGS["PORT"][0]
        assert f'("{route}")' in app


# ---- the real thing ----


@pytest.mark.long
def test_the_images_steps_work_in_a_clean_environment():
    command = [sys.executable, ROOT / "deploy" / "check_image.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "the image's steps work" in done.stdout
