"""Dockerfile, .dockerignore and workflow against the repository: what they name must be there, and nothing be missing."""

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
# Imported inside functions, only for CUDA, a ResNet or int8: requirements.txt has them, the image not
PREPARING = {"torch", "clip", "nncf"}
OPTIONAL = {"c2pa"}  # where it is not installed, details say so
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif", ".bmp", ".tif", ".tiff", ".heic"}


def values(instructions, keyword):
    return [value for name, value in instructions if name == keyword]


def copied(instructions):
    """Everything that COPY takes from the repository."""
    return [
        source
        for value in values(instructions, "COPY")
        if not value.startswith("--from")
        for source in value.split()[:-1]
    ]


def files_below(path):
    return [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]


def requirements(name):
    """Names in a requirements file, lower case, those of the files it includes as well."""
    names = set()
    for line in (ROOT / name).read_text().splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            names |= requirements(line[3:])
        elif line:
            names.add(re.match(r"[\w.-]+", line)[0].lower())
    return names


def imports(path):
    """(module, whether the file cannot be imported without it) of each import; those that may fail are left out."""

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
    """Our own files that these import, themselves included, however late: {path: its imports}."""
    found, todo = {}, list(files)
    while todo:
        path = todo.pop()
        if path not in found and (ROOT / path).is_file():
            found[path] = imports(ROOT / path)
            todo += [f"{module.replace('.', '/')}.py" for module, _ in found[path]]
    return found


def uncopied(files, steps):
    """Those of our files that no COPY takes."""
    return [
        file
        for file in files
        if not any(file == source or file.startswith(f"{source}/") for source in copied(steps))
    ]


def ignored(path, lines):
    """Does .dockerignore leave this file out? The last pattern that fits it or a folder above decides; no `**` here."""
    out = False
    for line in lines:
        pattern = line.removeprefix("!").strip("/").split("/")
        above = path.split("/")[: len(pattern)]
        if len(above) == len(pattern) and all(map(fnmatchcase, above, pattern)):
            out = not line.startswith("!")
    return out


@pytest.fixture(scope="module")
def dockerignore():
    lines = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert not any("**" in line for line in lines)
    return lines


# ---- paths ----


@pytest.mark.parametrize("source", copied(INSTRUCTIONS))
def test_what_is_copied_exists_and_is_not_left_out_of_git_or_of_the_build(source, dockerignore):
    assert (ROOT / source).exists(), f"COPY {source}: no such file"
    for path in files_below(ROOT / source):
        name = path.relative_to(ROOT).as_posix()
        assert not ignored(name, dockerignore), f".dockerignore leaves {name} out"
        assert subprocess.run(["git", "-C", ROOT, "check-ignore", "-q", name]).returncode != 0, (
            f"git ignores {name}"
        )


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
def test_what_the_image_does_not_need_stays_out_of_the_build(path, dockerignore):
    assert ignored(path, dockerignore)


def test_no_picture_is_copied():
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
def test_the_page_and_the_description_of_the_routes_are_copied(steps):
    assert (
        uncopied(["detector/service/templates/index.html", "detector/service/openapi.json"], steps)
        == []
    )


def test_a_prepared_encoder_is_copied_to_where_it_will_be_looked_for():
    stages = read_stages(INSTRUCTIONS, CLIP_MODEL="ViT-L/14")
    cache = {
        env["CLIP_CACHE"]
        for name in ("encoder", "serve")
        for env in [environment(steps_of(stages, name))]
    }
    assert len(cache) == 1
    assert f"--from=encoder {cache.pop()}/encoders " in " ".join(values(PREPARED, "COPY"))


# ---- packages ----


@pytest.mark.parametrize("steps", [DEMO, PREPARED], ids=["demo", "prepared"])
def test_the_image_installs_one_requirements_file_without_torch(steps):
    named = re.findall(r"-r (\S+)", " ".join(values(steps, "RUN")))
    assert named == ["requirements-serve.txt"]
    heavy = {name for name in requirements(named[0]) if re.match("torch|clip|nvidia|nncf", name)}
    assert not heavy, f"{named[0]} brings {heavy}"


def test_every_install_leaves_no_cache_and_has_its_files():
    for keyword, value in INSTRUCTIONS:
        if keyword == "RUN" and "pip install" in value:
            assert "--no-cache-dir" in value
    for name, (_, steps) in read_stages(INSTRUCTIONS, CLIP_MODEL="ViT-L/14").items():
        for file in re.findall(r"-r (\S+)", " ".join(values(steps, "RUN"))):
            included = re.findall(r"^-r (\S+)", (ROOT / file).read_text(), re.M)
            assert {file, *included} <= set(copied(steps)), name


def test_every_package_that_the_service_imports_is_installed():
    """Named in requirements-serve.txt, or brought by a package that is (werkzeug by flask)."""
    listed = requirements("requirements-serve.txt")
    brought = {
        re.match(r"[\w.-]+", need)[0].lower()
        for name in listed
        for need in importlib.metadata.requires(name) or ()
        if "extra ==" not in need
    }
    owners = importlib.metadata.packages_distributions()
    ours = closure("app.py", "gunicorn.conf.py")
    for file, found in ours.items():
        for module, needed in found:
            if (
                module in sys.stdlib_module_names
                or module.startswith("detector")
                or module in PREPARING | OPTIONAL
                and not needed
            ):
                continue
            names = {name.lower().replace("_", "-") for name in owners.get(module, [module])}
            assert names & (listed | brought), f"{file} imports {module}, which the image has not"


# ---- commands and settings ----


def environment(steps):
    return {name: value for line in values(steps, "ENV") for name, value in read_env(line).items()}


def test_the_service_is_started_as_a_user_would():
    command = json.loads(values(DEMO, "CMD")[-1])
    assert command == ["python", "app.py"] == json.loads(values(PREPARED, "CMD")[-1])


def test_the_encoder_is_prepared_with_a_flag_that_exists():
    for script, flag in re.findall(
        r"python (\w+\.py) (--\w+)", " ".join(values(INSTRUCTIONS, "RUN"))
    ):
        assert f'"{flag}"' in (ROOT / script).read_text()


def test_the_health_check_asks_a_route_that_exists_without_a_shell():
    command = json.loads(values(DEMO, "HEALTHCHECK")[-1].split("CMD", 1)[1])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
    route = re.search(r"'(/\w+)'", command[2])[1]
    assert f'.get("{route}")' in (ROOT / "detector/service/app.py").read_text()


@pytest.mark.parametrize("steps", [DEMO, PREPARED], ids=["demo", "prepared"])
def test_every_variable_is_one_that_something_reads(steps):
    code = "".join((ROOT / path).read_text() for path in closure("app.py"))
    for name in environment(steps):
        assert (
            name in SETTINGS or name == "PYTHONDONTWRITEBYTECODE" or f'environ.get("{name}"' in code
        ), name
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


def test_the_demonstration_prepares_the_layers_that_the_shipped_model_was_trained_on():
    encoder = load_model(ROOT / "models" / "baseline.joblib")["encoder"]
    prepare = " ".join(values(DEMO + steps_of(read_stages(INSTRUCTIONS), "encoder"), "RUN"))
    assert (
        f'"${{CLIP_MODEL:-{clip_model_of(encoder)}}}" --layers "${{LAYERS:-{encoder["layers"]}}}"'
        in prepare
    )


def test_the_commit_can_be_given():
    assert "CODE_COMMIT" in [value.split("=")[0] for value in values(DEMO, "ARG")]
    assert environment(DEMO)["CODE_COMMIT"] == "${CODE_COMMIT}"


# ---- workflow ----


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load(WORKFLOW.read_text())


def test_the_workflow_has_its_two_jobs_and_every_step_does_one_thing(workflow):
    assert set(workflow["jobs"]) == {"test", "image"}
    assert True in workflow, "PyYAML reads the key `on` as true"
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert set(step) <= {"name", "uses", "with", "run", "if", "env"}


def test_the_workflow_pins_what_it_uses(workflow):
    for job in workflow["jobs"].values():
        assert re.fullmatch(r"ubuntu-\d\d\.\d\d", job["runs-on"])
        for step in job["steps"]:
            assert re.fullmatch(
                r"actions/[\w-]+@[0-9a-f]{40}", step.get("uses", "actions/x@" + 40 * "0")
            )


def test_the_workflow_calls_commands_that_exist(workflow):
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
    done = subprocess.run(
        [sys.executable, ROOT / "deploy" / "check_image.py"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "the image's steps work" in done.stdout
