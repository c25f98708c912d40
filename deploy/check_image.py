"""Does what the Dockerfile says, without a Docker engine: in a clean virtual environment, an empty home, a folder as root.

    python deploy/check_image.py

What to install, copy, set, start and probe is read from the Dockerfile, for the image that a plain `docker build .`
gives. Then: a photograph is posted, the answer, its header and the log are looked at, and SIGTERM must end it with 0.
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
    """Dockerfile -> [(keyword, value)] in order; comments out, continued lines joined."""
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
    """Instructions -> {stage name: (what it builds on, its instructions)}; the last one, without a name, is ''."""
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
    """All instructions that make this stage's image, those of the stages below it first."""
    base, own = stages[name]
    return (steps_of(stages, base) if base in stages else []) + own


def read_env(value):
    """'A=1 B=2' -> dict; no value of ours holds a blank."""
    return dict(pair.split("=", 1) for pair in value.split())


# ---- doing it ----


def build(stages, name, venv, root, args):
    """Carry out a stage's steps below `root`, with `venv` for the image's Python: -> (environment, working directory).

    A path that only an image has, such as /cache, is one below `root` here.
    """
    env, workdir = {}, root
    steps = [
        (keyword, value.replace("/cache", f"{root}/cache"))
        for keyword, value in steps_of(stages, name)
    ]
    for keyword, value in steps:
        if keyword == "ARG":
            name, _, default = value.partition("=")
            args.setdefault(name, default)
        elif keyword == "COPY" and value.startswith("--from="):
            stage, folder = re.match(r"--from=(\w+) (\S+)", value).groups()
            below = root.with_name(stage)
            build(stages, stage, venv, below, dict(args))
            shutil.copytree(folder.replace(str(root), str(below)), folder)
        elif keyword == "ENV":
            env |= read_env(expand(value, args))
        elif keyword == "WORKDIR":
            workdir = root / value.lstrip("/")
            workdir.mkdir(parents=True, exist_ok=True)
        elif keyword == "COPY":
            copy(value.split(), workdir)
        elif (
            keyword == "RUN"
        ):  # with the caller's environment: pip's settings, proxies, certificates
            print(f"RUN {value}", flush=True)
            subprocess.run(
                value,
                shell=True,
                check=True,
                cwd=workdir,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **args, **env, "PATH": path_with(venv)},
            )
    return env, workdir


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
        answer = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        answer = error
    return answer.status, answer.headers, json.load(answer)


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
    """What a user and the engine would do with the running image."""
    status, headers, verdict = ask(post(f"{url}/classify", photo.read_bytes()))
    print(f"{photo.name}: {verdict}, X-Model-Notice: {headers['X-Model-Notice']}")
    assert status == 200 and list(verdict) == ["classification", "confidence"], verdict
    assert verdict["classification"] in ("real", "fake") and 0 <= verdict["confidence"] <= 1
    assert "demonstration" in headers["X-Model-Notice"]
    assert ask(post(f"{url}/classify", b"no image"))[0] == 415
    subprocess.run(healthcheck, env=env, cwd=workdir, check=True)
    dead = subprocess.run(
        healthcheck, env={**env, "PORT": str(free_port())}, cwd=workdir, capture_output=True
    )
    assert dead.returncode == 1, "the health check passes where nothing listens"


def main():
    temporary = Path(tempfile.mkdtemp(prefix="image-"))
    venv, root, home, log = (temporary / name for name in ("venv", "root", "home", "log"))
    home.mkdir()
    process = None
    try:
        stages = read_stages(read_dockerfile(ROOT / "Dockerfile"))
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        env, workdir = build(stages, "", venv, root, {"CODE_COMMIT": "0123abc"})
        env |= {"PATH": path_with(venv), "HOME": str(home), "PORT": str(free_port())}
        said = dict(steps_of(stages))  # the last of each keyword holds, as in an image
        healthcheck = json.loads(said["HEALTHCHECK"].split("CMD", 1)[1])

        def python(code):
            return subprocess.check_output(
                ["python", "-c", code], env=env, cwd=workdir, text=True
            ).strip()

        assert python("import importlib.util as u; print(u.find_spec('torch'))") == "None"
        assert (
            python("from detector.base.project import code_commit; print(code_commit())")
            == "0123abc"
        )
        photo = (
            Path(python("import sklearn; print(sklearn.__path__[0])")) / "datasets/images/china.jpg"
        )

        started = time.monotonic()
        with log.open("wb") as file:
            process = subprocess.Popen(
                json.loads(said["CMD"]), env=env, cwd=workdir, stdout=file, stderr=file
            )
        url = f"http://127.0.0.1:{env['PORT']}"
        wait_until_ready(url, process)
        print(f"ready after {time.monotonic() - started:.1f} s")
        probe(url, photo, healthcheck, env, workdir)
        process.terminate()
        assert process.wait(30) == 0, f"SIGTERM ended it with {process.returncode}"
        assert "demonstration" in log.read_text(), (
            "the log does not say that this is a demonstration"
        )
        assert not list(home.rglob("*")), "something was written into the home"
        print("the image's steps work")
    except Exception:
        print(log.read_text() if log.exists() else "", file=sys.stderr)
        raise
    finally:
        if process and process.poll() is None:
            process.kill()
        shutil.rmtree(temporary)


if __name__ == "__main__":
    main()
