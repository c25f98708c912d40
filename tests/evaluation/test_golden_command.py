"""golden.py against the live service, a service that misbehaves, and an installed Pushgateway."""

import gc
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import ROOT, assert_one_line_error
from live import Live, free_port
from made_up import build, make_columns
from patience import PATIENCE
from PIL import Image
from standins import MODEL, REAL, Stub, make_models, pushed, pushgateway, tinted

import golden as command
from detector.base.constants import CLASSES
from detector.base.errors import UsageError
from detector.base.files import sha256
from detector.evaluation import golden
from detector.evaluation.comparison import Judged
from detector.evaluation.intervals import share, words
from detector.evaluation.metrics import of_both
from detector.model.file import load_model, save_model
from detector.model.score import p_fake_of

TOKEN = "a token for the golden set"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("API_KEY", TOKEN)


@pytest.fixture(scope="module")
def folder(make_folder, tmp_path_factory):
    """Images that trained no model, more of them real."""
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


def current(service):
    """GET /model of the live service."""
    return service.session.get(f"{service.url}/model", timeout=PATIENCE).json()


@pytest.fixture
def serve(service, models):
    """Function: serve('worse') -> GET /model once that model serves; at the end 'good' serves."""

    def put(name):
        wanted, path = load_model(models / f"{name}.joblib"), service.log.parent / "model.joblib"
        shutil.copy(models / f"{name}.joblib", path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        service.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + PATIENCE
        while (serving := current(service))["sha256"] != wanted["sha256"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return serving

    yield put
    put("good")


@pytest.fixture
def run(script, service, folder):
    """Function: golden.py on the live service with its token -> CompletedProcess."""

    def call(url=service.url, **env):
        return script("golden.py", "--url", url, "--data_dir", folder, **env)

    return call


@pytest.fixture
def here(capsys):
    """Function: golden.py in this process -> (exit code, stdout, stderr).

    A connection left open is an error here.
    """

    def call(url, data_dir, *flags):
        code = command.main(["--url", str(url), "--data_dir", str(data_dir), *flags])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(here):
    """Function: golden.py in this process fails with one line of all `words` -> the line."""

    def call(url, data_dir, *words, flags=()):
        with pytest.raises(UsageError) as error:
            here(url, data_dir, *flags)
        line = str(error.value)
        assert len(line.splitlines()) == 1 and all(word in line for word in words), line
        return line

    return call


@pytest.fixture(scope="module")
def expected(service, folder):
    """The good model's verdicts without golden.py, {label: [right or not]}."""
    return {
        label: [
            service.post(path.read_bytes()).json()["classification"] == label
            for path in sorted((folder / label).iterdir())
        ]
        for label in CLASSES
    }


def rows(out):
    """The printed table -> {version: (images, errors, the other words)}."""
    lines = [line.split() for line in out.splitlines()[1:]]
    return {version: (int(images), int(errors), rest) for version, images, errors, *rest in lines}


def shown(right):
    """{label: [right or not]} -> the accuracies as the table shows them."""
    shares = [share(right[label]) for label in CLASSES]
    return " ".join(map(words, [*shares, of_both(*shares)]))


# ---- against the service ----


def test_a_good_model_ends_with_0(run, service, expected):
    result, floor = run(), current(service)["golden_floor"]
    assert result.returncode == 0, result.stderr
    images, errors, rest = rows(result.stdout)["v1.0.0"]
    assert (images, errors) == (46, 0)
    assert " ".join(rest) == f"{shown(expected)} {floor:.2f}" and 0.7 < floor <= float(rest[6])


def test_a_worse_model_is_below_its_floor_and_ends_with_1(here, serve, service, folder):
    floor = serve("worse")["golden_floor"]
    code, out, err = here(service.url, folder)
    assert code == 1 and list(rows(out)) == ["v1.1.0"]
    line = r"v1\.1\.0: balanced accuracy (\S+) \[.*\] is below the floor (\S+),"
    accuracy = re.search(line, err)
    assert float(accuracy[1]) < floor and accuracy[2] == f"{floor:.3f}" and "chance" not in err


def test_a_model_without_test_metrics_has_no_floor(here, serve, service, folder):
    assert serve("untested")["golden_floor"] is None
    code, out, err = here(service.url, folder)
    assert code == 0 and rows(out)["v0.9.0"][2][-1] == "none"
    assert "v0.9.0 has no floor: its model holds no test metrics" in err


def test_each_verdict_counts_for_the_version_that_gave_it(
    service, serve, folder, monkeypatch, here, gateway
):
    right = {version: {label: [] for label in CLASSES} for version in ("v1.0.0", "v1.1.0")}
    classify = golden.classify

    def swapped_in_between(client, path):
        if [sum(map(len, tally.values())) for tally in right.values()] == [20, 0]:
            assert serve("worse")["version"] == "v1.1.0"
        verdict, version = classify(client, path)
        right[version][path.parent.name].append(verdict == path.parent.name)
        return verdict, version

    monkeypatch.setattr(golden, "classify", swapped_in_between)
    code, out, err = here(service.url, folder, "--pushgateway", gateway)
    assert (code, [row[0] for row in rows(out).values()]) == (1, [20, 26])
    figures = pushed(gateway)
    for version, tally in right.items():
        assert all(tally.values()) and shown(tally) in " ".join(rows(out)[version][2])
        assert figures["detector_golden_images", version] == sum(map(len, tally.values()))
    # Neither accuracy nor timestamp: a few images are no reason for an alert.
    assert {name for name, _ in figures} == {
        f"detector_golden_{name}" for name in ("floor", "images", "errors")
    }
    assert "changed during the run (v1.0.0 -> v1.1.0)" in err
    assert "v1.1.0: balanced accuracy" in err and "v1.0.0: " not in err


def test_another_file_under_the_same_version_is_a_change_too(
    service, serve, models, folder, monkeypatch, here
):
    same = load_model(models / "good.joblib")
    del same["sha256"]
    rule = {**same["threshold_rule"], "note": "trained again"}
    save_model(models / "same.joblib", {**same, "threshold_rule": rule})
    names, model = iter(["good", "same"]), golden.Service.model
    monkeypatch.setattr(golden.Service, "model", lambda self: (serve(next(names)), model(self))[1])
    code, _, err = here(service.url, folder)
    assert code == 1 and "changed during the run (v1.0.0)" in err


def test_copies_of_an_image_count_once(here, service, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "more")
    for i in range(30):
        shutil.copy(folder / "real" / "000.jpg", tmp_path / "more" / "real" / f"copy{i}.jpg")
    _, out, err = here(service.url, tmp_path / "more")
    assert out == here(service.url, folder)[1] and "left out: 30 copies" in err


def test_an_interval_counts_copies_saved_anew_as_one_image(here, four):
    """Their bytes differ. All verdicts are 'real', so each class has one accuracy."""
    for label in CLASSES:
        with Image.open(four / label / "000.jpg") as image:
            for quality in range(60, 90, 3):
                image.save(four / label / f"copy{quality}.jpg", quality=quality)
    with Stub(by_path(REAL)) as stub:
        _, out, err = here(stub.url, four)
    assert rows(out)["v1"][0] == 24 and "left out" not in err
    pair = {label: [label == "real"] * 2 for label in CLASSES}
    assert shown(pair) in " ".join(rows(out)["v1"][2])


def test_an_interval_of_a_promotion_counts_copies_saved_anew_as_one_image():
    columns = {name: np.repeat(values, 5, 0) for name, values in make_columns(seed=2).items()}
    columns["sha256"] = np.array([f"{i:064x}" for i in range(len(columns["labels"]))])
    model = build(make_columns(seed=1))
    tally = golden.tally_of(Judged(model, None, columns, p_fake_of(model, columns["features"])))
    every_fifth = {name: [right for right, _ in tally[name][::5]] for name in CLASSES}
    assert 0 < np.mean(every_fifth["real"]) < 1
    whole, of_few = golden.accuracies(tally)[0], share(every_fifth["real"])
    assert whole["n"] == 5 * of_few["n"] and whole["interval"] == pytest.approx(
        of_few["interval"], abs=0.02
    )


def test_images_that_trained_a_model_do_not_count_for_its_promotion():
    trained, others = make_columns(seed=1), make_columns(real=10, fake=8, seed=2)
    model = build(trained)
    columns = {name: np.concatenate([trained[name], others[name]]) for name in trained}
    judged = Judged(model, None, columns, p_fake_of(model, columns["features"]))
    tally = golden.tally_of(judged)
    assert [len(tally[name]) for name in CLASSES] == [10, 8]


def test_images_without_a_verdict_are_listed_and_end_with_1(here, service, four):
    (four / "real" / "cut.jpg").write_bytes((four / "real" / "000.jpg").read_bytes()[:300])
    (four / "fake" / "notes.txt").write_text("no image")
    (four / "fake" / "gone.jpg").symlink_to("nowhere")
    (four / "fake" / "large.png").write_bytes(b"\x89PNG" + bytes(1_000_000))
    code, out, err = here(service.url, four)
    assert code == 1 and rows(out)["v1.0.0"][:2] == (4, 4)
    for name, why in (
        ("cut.jpg", "422: "),
        ("notes.txt", "415: "),
        ("gone.jpg", "No such file"),
        ("large.png", "larger than the"),
    ):
        assert re.search(rf"^no verdict on \S+{re.escape(name)}: .*{why}", err, re.MULTILINE), err
    assert "4 of 8 images have no verdict" in err


@pytest.mark.parametrize(
    "token, words",
    [
        ("", "401, the service asks for a token"),
        ("another", "401, the service refuses this token"),
        ("two\nlines", "no header may carry"),
        ("é", "no header may carry"),
    ],
)
def test_a_refused_token_is_an_error_that_does_not_show_it(
    refused, service, four, monkeypatch, token, words
):
    monkeypatch.setenv("API_KEY", token)
    line = refused(service.url, four, words, "API_KEY")
    assert not token or token not in line


def test_a_token_may_end_with_a_line_end(here, service, four, monkeypatch):
    monkeypatch.setenv("API_KEY", TOKEN + "\n")
    assert rows(here(service.url, four)[1])["v1.0.0"][:2] == (4, 0)


# ---- what a user can get wrong ----


@pytest.mark.parametrize(
    "url, words",
    [
        ("127.0.0.1:8000", "must begin with"),
        ("file:///etc", "must begin with"),
        ("http://", "no host"),
        ("http://127.0.0.1:port", "port"),
        ("http://[::1", "IPv6"),
        ("http://a b", "control characters"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused(refused, four, url, words):
    refused(url, four, f"--url {url.rstrip('/')}: ", words)


def test_a_folder_needs_both_labels(refused, four, tmp_path):
    shutil.move(four / "fake", tmp_path)
    for data_dir, why in (
        ("nowhere", "no such folder"),
        (four / "real", "label"),
        (four, "only one class"),
    ):
        refused("http://127.0.0.1:9", data_dir, f"--data_dir {data_dir}", why)


def test_an_image_under_both_labels_is_refused_before_any_request(refused, four):
    shutil.copy(four / "real" / "001.jpg", four / "fake" / "x.jpg")
    refused("http://127.0.0.1:9", four, "fake/x.jpg and real/001.jpg", "both labels")


def test_an_unreachable_service_is_a_one_line_error(run):
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


def test_a_proxy_that_returns_an_error_is_named(run):
    with Stub(lambda *_: (502, {}, b"<html>bad gateway</html>")) as stub:
        result = run(url="http://detector.test", HTTP_PROXY=stub.url)
    assert_one_line_error(result, "GET /model returned 502", f"proxy {stub.url} of HTTP_PROXY")


# ---- a service that misbehaves ----


def by_path(verdict, model=MODEL):
    """An `answer` for Stub: `model` for /model, else `verdict`, or what it returns for a number."""

    def answer(path, number):
        if path == "/model":
            return model
        return verdict(number) if callable(verdict) else verdict

    return answer


def test_a_busy_service_is_tried_again_after_its_retry_after(here, four, monkeypatch):
    waits = []
    monkeypatch.setattr(golden.time, "sleep", waits.append)

    def answer(path, number):
        if number < 3:
            return 503, {"Retry-After": str(2 * number)}, {"error": "busy"}
        return by_path(REAL)(path, number)

    with Stub(answer) as stub:
        _, out, _ = here(stub.url, four)
    assert waits == [2, 4, 2, 4] and rows(out)["v1"][:2] == (4, 0)


def test_a_busy_service_is_given_up_after_five_tries_an_image(here, four):
    with Stub(by_path((503, {"Retry-After": "0"}, {"error": "busy"}))) as stub:
        code, out, err = here(stub.url, four)
    assert code == 1 and rows(out)["v1"][:2] == (0, 4) and len(stub.asked["/classify"]) == 20
    assert "503: busy" in err and "nan" not in out


def test_a_broken_connection_is_tried_again_and_costs_only_its_image(here, four, monkeypatch):
    monkeypatch.setattr(golden, "RETRY_S", 0.01)
    with Stub(by_path(lambda number: None if number in (1, *range(3, 8)) else REAL)) as stub:
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
def test_the_wait_follows_retry_after_within_limits(given, seconds):
    assert golden.retry_after({"Retry-After": given}) == seconds


@pytest.mark.parametrize(
    "model, verdict, words",
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
def test_another_service_is_a_one_line_error(refused, four, model, verdict, words):
    with Stub(by_path(verdict, model)) as stub:
        refused(stub.url, four, f"--url {stub.url}", *words)


def test_a_redirect_is_not_followed_with_the_token(refused, four):
    with (
        Stub(lambda *_: MODEL) as other,
        Stub(lambda path, _: (302, {"Location": other.url + path}, b"")) as stub,
    ):
        refused(stub.url, four, "GET /model", "302")
    assert other.asked == {} and stub.asked["/model"][0]["Authorization"] == f"Bearer {TOKEN}"


def test_a_service_that_goes_away_during_the_run_ends_it(four, monkeypatch):
    monkeypatch.setattr(golden, "RETRY_S", 0.01)
    with Stub(by_path(REAL)) as stub:
        service = golden.Service(stub.url)
        service.model()
    with pytest.raises(UsageError, match="cannot be reached"):
        golden.run_through(service, golden.read_golden(four), "v1")


def test_an_accuracy_below_the_floor_by_chance_is_marked(here, four):
    with Stub(by_path(REAL, (200, {}, {**MODEL[2], "golden_floor": 0.6}))) as stub:
        code, _, err = here(stub.url, four)
    assert code == 1 and "below the floor 0.600" in err
    assert "4 images are too few to rule out chance" in err


# ---- the Pushgateway ----


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    with pushgateway(tmp_path_factory.mktemp("gateway")) as url:
        yield url


def test_the_pushed_figures_replace_those_of_an_older_version(
    here, serve, gateway, service, folder, expected, tmp_path
):
    started = time.time()
    assert here(service.url, folder, "--pushgateway", gateway)[0] == 0
    figures = pushed(gateway)
    stamp = figures.pop(("detector_golden_run_timestamp_seconds", "v1.0.0"))
    accuracy = of_both(*(share(expected[label]) for label in CLASSES))["value"]
    assert figures == {
        ("detector_golden_accuracy", "v1.0.0"): pytest.approx(accuracy),
        ("detector_golden_floor", "v1.0.0"): current(service)["golden_floor"],
        ("detector_golden_images", "v1.0.0"): 46,
        ("detector_golden_errors", "v1.0.0"): 0,
    }
    assert started <= stamp <= time.time()

    serve("worse")
    more, address = shutil.copytree(folder, tmp_path / "more"), gateway.removeprefix("http://")
    (more / "real" / "notes.txt").write_text("no image")
    assert here(service.url, more, "--pushgateway", address)[0] == 1
    figures = pushed(gateway)
    assert {version for _, version in figures} == {"v1.1.0"}
    assert figures["detector_golden_errors", "v1.1.0"] == 1
    assert (
        figures["detector_golden_accuracy", "v1.1.0"] < figures["detector_golden_floor", "v1.1.0"]
    )


def test_a_missing_figure_is_not_pushed_as_0(here, four, gateway):
    without_floor = (200, {}, {**MODEL[2], "golden_floor": None})
    with Stub(by_path((422, {}, {"error": "x"}), without_floor)) as stub:
        assert here(stub.url, four, "--pushgateway", gateway)[0] == 1
    assert {name for name, _ in pushed(gateway)} == {
        f"detector_golden_{name}" for name in ("images", "errors", "run_timestamp_seconds")
    }


@pytest.mark.parametrize("gone", ["http://127.0.0.1:{}", "ftp://127.0.0.1:{}"])
def test_an_unreachable_gateway_is_an_error_after_the_result(refused, four, capsys, gone):
    gone = gone.format(free_port())
    with Stub(by_path(REAL)) as stub:
        refused(stub.url, four, f"--pushgateway {gone}", flags=["--pushgateway", gone])
    assert rows(capsys.readouterr().out)["v1"][:2] == (4, 0)


def test_a_gateway_that_refuses_the_figures_is_a_one_line_error(refused, four):
    with Stub(by_path(REAL)) as stub:
        flags = ["--pushgateway", stub.url]
        refused(stub.url, four, f"--pushgateway {stub.url}", "501", flags=flags)
    gc.collect()  # a connection left open is an error here


def test_the_command_imports_no_heavy_package():
    heavy = "torch sklearn scipy matplotlib seaborn openvino flask prometheus_client requests"
    code = (
        "import golden, sys; from detector.evaluation import golden;"
        f" print([name for name in {heavy.split()} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout.strip() == "[]", done.stderr
