"""golden.py: a labelled folder through the service as it runs, and a Pushgateway as it is installed."""

import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT, assert_one_line_error
from live import Live, free_port
from patience import PATIENCE
from standins import MODEL, REAL, Stub, make_models, pushed, pushgateway, tinted

import golden as command
from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.base.files import sha256
from detector.evaluation import golden
from detector.evaluation.metrics import of_both, share, words
from detector.model.file import load_model, save_model

TOKEN = "a token for the golden set"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("API_KEY", TOKEN)


@pytest.fixture(scope="module")
def folder(make_folder, tmp_path_factory):
    """Other images than those of training, more of them real."""
    return tinted(make_folder(tmp_path_factory.mktemp("golden"), {"real": 32, "fake": 14}, seed=5))


@pytest.fixture
def four(make_folder, tmp_path):
    return make_folder(tmp_path / "four", {"real": 2, "fake": 2})


@pytest.fixture(scope="module")
def models(make_folder, tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"), make_folder)


@pytest.fixture(scope="module")
def service(models, tmp_path_factory):
    place = tmp_path_factory.mktemp("service")
    (place / "keys").write_text(f"golden {sha256(TOKEN.encode())}\n")
    shutil.copy(models / "good.joblib", place / "model.joblib")
    live = Live(
        place,
        MODEL_PATH=str(place / "model.joblib"),
        API_KEYS_FILE=str(place / "keys"),
        MAX_UPLOAD_BYTES="1000000",
    )
    live.session.headers["Authorization"] = f"Bearer {TOKEN}"
    yield live
    assert live.stop() == 0


@pytest.fixture
def serve(service, models):
    """Function: serve('worse') -> that model file is put in place and serves; the good one again at the end."""

    def put(name):
        wanted, path = load_model(models / f"{name}.joblib"), service.log.parent / "model.joblib"
        shutil.copy(models / f"{name}.joblib", path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        service.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + PATIENCE
        while (now := service.session.get(f"{service.url}/model", timeout=PATIENCE).json())[
            "sha256"
        ] != wanted["sha256"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return now

    yield put
    put("good")


@pytest.fixture
def run(script, service, folder):
    """Function: golden.py on the live service with its token -> CompletedProcess."""

    def call(*flags, data_dir=folder, url=service.url, **env):
        return script("golden.py", "--url", url, "--data_dir", data_dir, *flags, **env)

    return call


@pytest.fixture
def here(capsys):
    """Function: golden.py in this process, where a connection left open is an error -> (exit code, stdout, stderr)."""

    def call(url, data_dir, *flags):
        code = command.main(["--url", str(url), "--data_dir", str(data_dir), *flags])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(here):
    """Function: golden.py in this process ends with one line that says all of `said`."""

    def call(url, data_dir, *said):
        with pytest.raises(UsageError) as error:
            here(url, data_dir)
        line = str(error.value)
        assert len(line.splitlines()) == 1 and all(word in line for word in said), line

    return call


@pytest.fixture(scope="module")
def asked(service, folder):
    """What the good model says of the folder, {label: [right or not]}, asked without golden.py."""
    return {
        label: [
            service.post(path.read_bytes()).json()["classification"] == label
            for path in sorted((folder / label).iterdir())
        ]
        for label in CLASSES
    }


def rows(out):
    """The printed table -> {version: (images, errors, the words after them)}."""
    lines = [line.split() for line in getattr(out, "stdout", out).splitlines()[1:]]
    return {version: (int(images), int(errors), rest) for version, images, errors, *rest in lines}


# ---- against the service ----


def test_a_model_that_keeps_its_promise_ends_with_0(run, service, asked):
    result, floor = (
        run(),
        service.session.get(f"{service.url}/model", timeout=PATIENCE).json()["golden_floor"],
    )
    (images, errors, rest), shares = (
        rows(result)["v1.0.0"],
        [share(asked[label]) for label in CLASSES],
    )
    assert result.returncode == 0, result.stderr
    assert (images, errors) == (46, 0)
    assert " ".join(rest) == " ".join(map(words, [*shares, of_both(*shares)])) + f" {floor:.2f}"
    assert 0.7 < floor <= float(rest[6])


def test_a_worse_model_is_below_its_floor_and_ends_with_1(run, serve):
    floor = serve("worse")["golden_floor"]
    result = run()
    assert result.returncode == 1
    accuracy = re.search(
        r"v1\.1\.0: balanced accuracy (\S+) \[.*\] is below the floor (\S+),", result.stderr
    )
    assert float(accuracy[1]) < floor and accuracy[2] == f"{floor:.3f}"
    assert "chance" not in result.stderr and list(rows(result)) == ["v1.1.0"]


def test_a_model_without_test_metrics_is_measured_and_held_against_nothing(run, serve):
    assert serve("untested")["golden_floor"] is None
    result = run()
    assert (
        result.returncode == 0
        and "v0.9.0 has no floor: its model holds no test metrics" in result.stderr
    )
    assert rows(result)["v0.9.0"][2][-1] == "none"


def test_each_verdict_counts_for_the_version_that_gave_it(
    service, serve, folder, monkeypatch, here, gateway
):
    right, classify = (
        {"v1.0.0": {"real": [], "fake": []}, "v1.1.0": {"real": [], "fake": []}},
        golden.classify,
    )

    def swapped_in_between(asked, path):
        if (
            sum(map(len, right["v1.0.0"].values())) == 20
            and not right["v1.1.0"]["real"] + right["v1.1.0"]["fake"]
        ):
            assert serve("worse")["version"] == "v1.1.0"
        said, version = classify(asked, path)
        right[version][path.parent.name].append(said == path.parent.name)
        return said, version

    monkeypatch.setattr(golden, "classify", swapped_in_between)
    code, out, err = here(service.url, folder, "--pushgateway", gateway)
    assert (code, [row[0] for row in rows(out).values()]) == (1, [20, 26])
    for version, found in right.items():
        shares = [share(found[label]) for label in CLASSES]
        assert all(found.values()) and " ".join(
            map(words, [*shares, of_both(*shares)])
        ) in " ".join(rows(out)[version][2])
        assert pushed(gateway)["detector_golden_images", version] == sum(map(len, found.values()))
    assert {name.removeprefix("detector_golden_") for name, _ in pushed(gateway)} == {
        "floor",
        "images",
        "errors",
    }  # nothing to alarm on
    assert (
        "changed during the run (v1.0.0 -> v1.1.0)" in err
        and "v1.1.0: balanced accuracy" in err
        and "v1.0.0: " not in err
    )


def test_another_file_under_the_same_version_is_a_change_too(
    service, serve, models, folder, monkeypatch, here
):
    same = load_model(models / "good.joblib")
    del same["sha256"]
    save_model(
        models / "same.joblib",
        {**same, "threshold_rule": {**same["threshold_rule"], "note": "trained again"}},
    )
    answers = iter(["good", "same"])
    ask = golden.Service.model
    monkeypatch.setattr(golden.Service, "model", lambda self: (serve(next(answers)), ask(self))[1])
    code, _, err = here(service.url, folder)
    assert code == 1 and "changed during the run (v1.0.0)" in err


def test_copies_of_an_image_count_once(here, service, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "more")
    for i in range(30):
        shutil.copy(folder / "real" / "000.jpg", tmp_path / "more" / "real" / f"copy{i}.jpg")
    _, out, err = here(service.url, tmp_path / "more")
    assert out == here(service.url, folder)[1] and "left out: 30 copies" in err


def test_images_without_a_verdict_are_told_and_end_with_1(here, service, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "more")
    (tmp_path / "more" / "real" / "torn.jpg").write_bytes(
        (folder / "real" / "000.jpg").read_bytes()[:300]
    )
    (tmp_path / "more" / "fake" / "notes.txt").write_text("no image")
    (tmp_path / "more" / "fake" / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "more" / "fake" / "large.png").write_bytes(b"\x89PNG" + bytes(1_000_000))
    code, out, err = here(service.url, tmp_path / "more")
    assert code == 1 and rows(out)["v1.0.0"] == (
        46,
        4,
        rows(here(service.url, folder)[1])["v1.0.0"][2],
    )
    for name, why in (
        ("torn.jpg", "422: "),
        ("notes.txt", "415: "),
        ("gone.jpg", "No such file"),
        ("large.png", "larger than the"),
    ):
        assert re.search(rf"^no verdict on \S+{re.escape(name)}: .*{why}", err, re.MULTILINE), err
    assert "4 of 50 images have no verdict" in err


@pytest.mark.parametrize(
    "token, said",
    [
        ("", "401, the service asks for a token"),
        ("another", "401, the service refuses this token"),
        ("two\nlines", "no header may carry"),
        ("é", "no header may carry"),
    ],
)
def test_a_token_that_is_refused_is_told_without_it(run, token, said):
    assert_one_line_error(result := run(API_KEY=token), said, "API_KEY")
    assert not token or token not in result.stdout + result.stderr


def test_a_token_may_end_as_a_file_does(here, service, four, monkeypatch):
    monkeypatch.setenv("API_KEY", TOKEN + "\n")
    assert rows(here(service.url, four)[1])["v1.0.0"][:2] == (4, 0)


# ---- what a user can get wrong ----


@pytest.mark.parametrize(
    "url, said",
    [
        ("127.0.0.1:8000", "must begin with"),
        ("file:///etc", "must begin with"),
        ("http://", "no host"),
        ("http://127.0.0.1:port", "port"),
        ("http://[::1", "IPv6"),
        ("http://a b", "control characters"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(refused, four, url, said):
    refused(url, four, f"--url {url.rstrip('/')}: ", said)


def test_a_folder_needs_both_labels(refused, four, tmp_path):
    shutil.move(four / "fake", tmp_path)
    for data_dir, why in (
        ("nowhere", "no such folder"),
        (four / "real", "label"),
        (four, "only one class"),
    ):
        refused("http://127.0.0.1:9", data_dir, f"--data_dir {data_dir}", why)


def test_a_picture_under_both_labels_is_refused_before_anything_is_asked(refused, four):
    shutil.copy(four / "real" / "001.jpg", four / "fake" / "x.jpg")
    refused("http://127.0.0.1:9", four, "fake/x.jpg and real/001.jpg", "both labels")


def test_a_service_that_is_not_there_is_told_in_one_line(run):
    url = f"http://127.0.0.1:{free_port()}"
    assert_one_line_error(run(url=url), f"--url {url}", "cannot be reached", "refused")


def test_a_dead_proxy_is_named_with_its_variable_and_the_remedy(run):
    proxy = f"127.0.0.1:{free_port()}"
    result = run(url="http://detector.test", http_proxy=f"http://me:secret@{proxy}")
    assert_one_line_error(
        result,
        f"proxy http://me:***@{proxy} of http_proxy",
        "unset http_proxy",
        "NO_PROXY=detector.test",
    )
    result = run(url="http://detector.test", http_proxy=f"http://{proxy}", no_proxy="detector.test")
    assert_one_line_error(result, "cannot be reached")
    assert "proxy" not in result.stderr


def test_a_proxy_that_answers_an_error_is_named(run):
    with Stub(lambda *_: (502, {}, b"<html>bad gateway</html>")) as stub:
        result = run(url="http://detector.test", HTTP_PROXY=stub.url)
    assert_one_line_error(result, "GET /model returned 502", f"proxy {stub.url} of HTTP_PROXY")


# ---- a service that misbehaves ----


def test_a_busy_service_is_asked_again_after_the_time_that_it_names(here, four, monkeypatch):
    waited = []
    monkeypatch.setattr(golden.time, "sleep", waited.append)

    def answer(path, number):
        return (
            (503, {"Retry-After": str(2 * number)}, {"error": "busy"})
            if number < 3
            else MODEL
            if path == "/model"
            else REAL
        )

    with Stub(answer) as stub:
        _, out, _ = here(stub.url, four)
    assert waited == [2, 4, 2, 4] and rows(out)["v1"][:2] == (4, 0)


def test_a_service_that_stays_busy_is_given_up_after_five_tries_an_image(here, four):
    with Stub(
        lambda path, _: (
            MODEL if path == "/model" else (503, {"Retry-After": "0"}, {"error": "busy"})
        )
    ) as stub:
        code, out, err = here(stub.url, four)
    assert code == 1 and rows(out)["v1"][:2] == (0, 4) and len(stub.asked["/classify"]) == 20
    assert "503: busy" in err and "nan" not in out


def test_a_connection_that_breaks_is_tried_again_and_costs_no_more_than_its_image(
    here, four, monkeypatch
):
    monkeypatch.setattr(golden, "RETRY_S", 0.01)
    with Stub(
        lambda path, number: (
            MODEL if path == "/model" else None if number in (1, *range(3, 8)) else REAL
        )
    ) as stub:
        code, out, err = here(stub.url, four)
    assert code == 1 and rows(out)["v1"][:2] == (3, 1) and "the connection broke" in err


@pytest.mark.parametrize(
    "given, seconds",
    [
        ("7", 7),
        ("86400", golden.LONGEST_WAIT_S),
        ("", golden.RETRY_S),
        ("-1", golden.RETRY_S),
        ("Wed, 21 Oct 2026 07:28:00 GMT", golden.RETRY_S),
        ("²", golden.RETRY_S),
    ],
)
def test_how_long_it_waits(given, seconds):
    assert golden.retry_after({"Retry-After": given}) == seconds


@pytest.mark.parametrize(
    "model, verdict, said",
    [
        ((200, {}, b"<html>"), REAL, ["GET /model", "names no model"]),
        ((200, {}, {"status": "ok"}), REAL, ["GET /model", "names no model"]),
        (
            (200, {}, {"version": "v1", "golden_floor": "0.5"}),
            REAL,
            ["GET /model", "names no model"],
        ),
        ((404, {}, b"not found"), REAL, ["GET /model", "404"]),
        ((500, {}, {"error": "internal error"}), REAL, ["GET /model", "500", "internal error"]),
        (
            MODEL,
            (200, {"X-Model-Version": "v1"}, b"<html>"),
            ["POST /classify", "without a verdict"],
        ),
        (
            MODEL,
            (200, {"X-Model-Version": "v1"}, {"classification": "cat"}),
            ["POST /classify", "without a verdict"],
        ),
        (MODEL, (200, {}, REAL[2]), ["POST /classify", "without a verdict"]),
        (MODEL, (401, {}, {"error": "a token is needed"}), ["401", "API_KEY"]),
    ],
    ids=[
        "html",
        "other json",
        "floor",
        "404",
        "500",
        "verdict html",
        "verdict other",
        "no version",
        "401 later",
    ],
)
def test_what_is_not_this_service_is_told_in_one_line(refused, four, model, verdict, said):
    with Stub(lambda path, _: model if path == "/model" else verdict) as stub:
        refused(stub.url, four, f"--url {stub.url}", *said)


def test_a_redirect_is_not_followed_with_the_token(refused, four):
    with (
        Stub(lambda *_: MODEL) as other,
        Stub(lambda path, _: (302, {"Location": other.url + path}, b"")) as stub,
    ):
        refused(stub.url, four, "GET /model", "302")
    assert other.asked == {} and stub.asked["/model"][0]["Authorization"] == f"Bearer {TOKEN}"


def test_a_service_that_goes_away_during_the_run_ends_it(four, monkeypatch):
    monkeypatch.setattr(golden, "RETRY_S", 0.01)
    with Stub(lambda path, _: MODEL if path == "/model" else REAL) as stub:
        service = golden.Service(stub.url)
        service.model()
    with pytest.raises(UsageError, match="cannot be reached"):
        golden.run_through(service, golden.read_golden(four), "v1")


def test_a_floor_that_chance_may_have_missed_is_said_to_be_so(here, four):
    with Stub(
        lambda path, _: (200, {}, {**MODEL[2], "golden_floor": 0.6}) if path == "/model" else REAL
    ) as stub:
        code, _, err = here(stub.url, four)
    assert (
        code == 1
        and "below the floor 0.600" in err
        and "4 images are too few to rule out chance" in err
    )


# ---- the Pushgateway ----


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    with pushgateway(tmp_path_factory.mktemp("gateway")) as url:
        yield url


def test_the_figures_stand_at_the_gateway_and_an_old_version_s_are_replaced(
    here, serve, gateway, service, folder, asked, tmp_path
):
    started = time.time()
    assert here(service.url, folder, "--pushgateway", gateway)[0] == 0
    found, floor = (
        pushed(gateway),
        service.session.get(f"{service.url}/model", timeout=PATIENCE).json()["golden_floor"],
    )
    stamp = found.pop(("detector_golden_run_timestamp_seconds", "v1.0.0"))
    accuracy = of_both(*(share(asked[label]) for label in CLASSES))["value"]
    assert found == {
        ("detector_golden_accuracy", "v1.0.0"): pytest.approx(accuracy),
        ("detector_golden_floor", "v1.0.0"): floor,
        ("detector_golden_images", "v1.0.0"): 46,
        ("detector_golden_errors", "v1.0.0"): 0,
    }
    assert started <= stamp <= time.time()

    serve("worse")
    shutil.copytree(folder, tmp_path / "more")
    (tmp_path / "more" / "real" / "notes.txt").write_text("no image")
    assert (
        here(service.url, tmp_path / "more", "--pushgateway", gateway.removeprefix("http://"))[0]
        == 1
    )
    found = pushed(gateway)
    assert {version for _, version in found} == {"v1.1.0"} and found[
        "detector_golden_errors", "v1.1.0"
    ] == 1
    assert found["detector_golden_accuracy", "v1.1.0"] < found["detector_golden_floor", "v1.1.0"]


def test_what_was_not_measured_is_not_pushed_as_0(here, four, gateway):
    nothing = (200, {}, {**MODEL[2], "golden_floor": None})
    with Stub(lambda path, _: nothing if path == "/model" else (422, {}, {"error": "x"})) as stub:
        assert here(stub.url, four, "--pushgateway", gateway)[0] == 1
    assert {name.removeprefix("detector_golden_") for name, _ in pushed(gateway)} == {
        "images",
        "errors",
        "run_timestamp_seconds",
    }


@pytest.mark.parametrize("gone", ["http://127.0.0.1:{}", "ftp://127.0.0.1:{}"])
def test_a_gateway_that_is_not_there_is_told_after_the_result(run, four, gone):
    gone = gone.format(free_port())
    with Stub(lambda path, _: MODEL if path == "/model" else REAL) as stub:
        result = run("--pushgateway", gone, url=stub.url, data_dir=four)
    assert_one_line_error(result, f"--pushgateway {gone}")
    assert rows(result)["v1"][:2] == (4, 0)


def test_a_gateway_that_refuses_the_figures_is_told_in_one_line(run, four):
    with Stub(lambda path, _: MODEL if path == "/model" else REAL) as stub:
        assert_one_line_error(
            run("--pushgateway", stub.url, url=stub.url, data_dir=four),
            f"--pushgateway {stub.url}",
            "501",
        )


def test_it_imports_nothing_heavy():
    heavy = (
        "torch",
        "sklearn",
        "scipy",
        "matplotlib",
        "seaborn",
        "openvino",
        "flask",
        "prometheus_client",
        "requests",
    )
    code = (
        "import golden, sys; from detector.evaluation import golden; print([name for name in"
        f" {heavy} if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert found.stdout.strip() == "[]", found.stderr
