"""Carry out the Dockerfile without a Docker engine, in a clean environment with an empty home.

    python deploy/check_image.py

The packages, files, settings, command and health check come from the Dockerfile, for the image
that a plain `docker build .` makes. Then the check posts a photograph and looks at the response,
its header and the log. At last SIGTERM must end the service with exit code 0.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


# ---- the Dockerfile ----


def read_dockerfile(path):
    """Dockerfile -> [(keyword, value)] in order, without comments, continued lines joined."""
    lines = [
        line
        for line in Path(path).read_text().splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [tuple(line.split(None, 1)) for line in joined]


def expand(text, values):
    """${NAME}, ${NAME:-word} and ${NAME:+word}: the three forms that our Dockerfile uses."""

    def replace(match):
        name, kind, word = match.groups()
        value = values.get(name, "")
        return {":-": value or word, ":+": word if value else "", None: value}[kind]

    return re.sub(r"\$\{(\w+)(?:(:-|:\+)([^}]*))?\}", replace, text)


def read_stages(instructions, **build_args):
    """Instructions -> {stage name: (its base, its instructions)}; the last stage's name is ''."""
    arguments, stages, current = dict(build_args), {}, None
    for keyword, value in instructions:
        if keyword == "FROM":
            base, name = re.fullmatch(r"(\S+)(?: AS (\w+))?", expand(value, arguments)).groups()
            current = []
            stages[name or ""] = base, current
        elif current is not None:
            current.append((keyword, value))
        else:  # ARG above the first FROM
            name, _, default = value.partition("=")
            arguments.setdefault(name, expand(default, arguments))
    return stages


def steps_of(stages, name=""):
    """All instructions that make this stage's image; the stages below it come first."""
    base, own = stages[name]
    return (steps_of(stages, base) if base in stages else []) + own


def read_env(value):
    """'A=1 B=2' -> dict; no value of ours holds a blank."""
    return dict(pair.split("=", 1) for pair in value.split())


# ---- the image's steps ----


def build(stages, name, venv, root, args):
    """Carry out a stage's steps below `root`, with `venv` as the image's Python.

    A path that only an image has, such as /cache, is a folder below `root` here.
    Returns (environment, working directory).
    """
    env, workdir = {}, root
    for keyword, value in steps_of(stages, name):
        value = value.replace("/cache", f"{root}/cache")
        if keyword == "ARG":
            argument, _, default = value.partition("=")
            args.setdefault(argument, default)
        elif keyword == "COPY" and value.startswith("--from="):
            copy_from_stage(stages, value, venv, root, args)
        elif keyword == "ENV":
            env |= read_env(expand(value, args))
        elif keyword == "WORKDIR":
            workdir = root / value.lstrip("/")
            workdir.mkdir(parents=True, exist_ok=True)
        elif keyword == "COPY":
            copy(value.split(), workdir)
        elif keyword == "RUN":
            run_step(value, workdir, {**args, **env, "PATH": path_with(venv)})
    return env, workdir


def run_step(command, workdir, env):
    """RUN, with the caller's environment for pip's settings, proxies and certificates."""
    print(f"RUN {command}", flush=True)
    env = {**os.environ, **env}
    subprocess.run(command, shell=True, check=True, cwd=workdir, stdout=subprocess.DEVNULL, env=env)


def copy_from_stage(stages, value, venv, root, args):
    """COPY --from=STAGE folder folder, after building that stage beside `root`."""
    stage, folder = re.match(r"--from=(\w+) (\S+)", value).groups()
    beside = root.with_name(stage)
    build(stages, stage, venv, beside, dict(args))
    shutil.copytree(folder.replace(str(root), str(beside)), folder)


def copy(arguments, workdir):
    """COPY a b ./ or COPY folder folder, from the repository."""
    *sources, target = arguments
    for source in sources:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, workdir / target, dirs_exist_ok=True)
        else:
            place = workdir / target / source if target.endswith("/") else workdir / target
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, place)


def path_with(venv):
    return f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ask(request, timeout=60):
    """URL or Request -> (status, headers, JSON)."""
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        response = error
    return response.status, response.headers, json.load(response)


def post(url, data):
    """One multipart field `image`, as curl -F image=@photo.jpg sends it."""
    head = (
        b'--cut\r\nContent-Disposition: form-data; name="image";'
        b' filename="photo.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    )
    headers = {"Content-Type": "multipart/form-data; boundary=cut"}
    return urllib.request.Request(url, head + data + b"\r\n--cut--\r\n", headers)


def wait_until_ready(url, process, seconds=60):
    for _ in range(seconds * 10):
        assert process.poll() is None, f"the service ended with {process.returncode}"
        try:
            if ask(f"{url}/readyz")[0] == 200:
                return
        except urllib.error.URLError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"not ready after {seconds} s")


def probe(url, photo, healthcheck, env, workdir):
    """Do what a user and a container engine do with the running image."""
    status, headers, verdict = ask(post(f"{url}/classify", photo.read_bytes()))
    print(f"{photo.name}: {verdict}, X-Model-Notice: {headers['X-Model-Notice']}")
    assert status == 200 and list(verdict) == ["classification", "confidence"], verdict
    assert verdict["classification"] in ("real", "fake") and 0 <= verdict["confidence"] <= 1
    assert "demonstration" in headers["X-Model-Notice"]
    assert ask(post(f"{url}/classify", b"no image"))[0] == 415
    subprocess.run(healthcheck, env=env, cwd=workdir, check=True)
    env = {**env, "PORT": str(free_port())}
    dead = subprocess.run(healthcheck, env=env, cwd=workdir, capture_output=True)
    assert dead.returncode == 1, "the health check passes where nothing listens"


def python(code, env, workdir):
    """What the image's Python prints."""
    command = ["python", "-c", code]
    return subprocess.check_output(command, env=env, cwd=workdir, text=True).strip()


def check_packages(env, workdir):
    """No torch, and the commit is known. Returns a photograph that scikit-learn installs."""
    assert python("import importlib.util as u; print(u.find_spec('torch'))", env, workdir) == "None"
    commit = python(
        "from detector.base.project import code_commit; print(code_commit())", env, workdir
    )
    assert commit == "0123abc"
    package = python("import sklearn; print(sklearn.__path__[0])", env, workdir)
    return Path(package) / "datasets/images/china.jpg"


def check_service(command, healthcheck, photo, env, workdir, log):
    """Start the service, use it, and end it with SIGTERM."""
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=env, cwd=workdir, stdout=file, stderr=file)
    try:
        url = f"http://127.0.0.1:{env['PORT']}"
        wait_until_ready(url, process)
        print(f"ready after {time.monotonic() - started:.1f} s")
        probe(url, photo, healthcheck, env, workdir)
        process.terminate()
        assert process.wait(30) == 0, f"SIGTERM ended it with {process.returncode}"
    finally:
        process.kill()
    assert "demonstration" in log.read_text(), "the log does not name the demonstration"


def main():
    temporary = Path(tempfile.mkdtemp(prefix="image-"))
    venv, root, home, log = (temporary / name for name in ("venv", "root", "home", "log"))
    home.mkdir()
    try:
        stages = read_stages(read_dockerfile(ROOT / "Dockerfile"))
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        env, workdir = build(stages, "", venv, root, {"CODE_COMMIT": "0123abc"})
        env |= {"PATH": path_with(venv), "HOME": str(home), "PORT": str(free_port())}
        last = dict(steps_of(stages))  # the last of each keyword holds, as in an image
        healthcheck = json.loads(last["HEALTHCHECK"].split("CMD", 1)[1])
        photo = check_packages(env, workdir)
        check_service(json.loads(last["CMD"]), healthcheck, photo, env, workdir, log)
        assert not list(home.rglob("*")), "something was written into the home"
        print("the image's steps work")
    except Exception:
        print(log.read_text() if log.exists() else "", file=sys.stderr)
        raise
    finally:
        shutil.rmtree(temporary)


if __name__ == "__main__":
    main()
