"""The page at /, in a real browser against the live service: what a visitor does, sees, hears and is told."""

import base64
import hashlib
import json
import os
import shutil

import pytest
from browsing import (
    CLASSIFY,
    COUNT,
    HAND_OVER,
    QUIET,
    answer,
    assert_says,
    assert_shows,
    card,
    fill,
    pick,
)
from live import Live
from made_up import BASELINE, NOTICE
from patience import PATIENCE


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium, one for all tests here, with a home of its own."""
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if path is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    try:
        import axe_playwright_python  # noqa: F401
        from playwright.sync_api import sync_playwright
    except ImportError as missing:
        pytest.skip(f"{missing.name} is not installed: pip install -r requirements/dev.txt")
    with sync_playwright() as playwright:
        home = {**os.environ, "HOME": str(tmp_path_factory.mktemp("chromium"))}
        chromium = playwright.chromium.launch(executable_path=path, args=QUIET, env=home)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    server = Live(tmp_path_factory.mktemp("page"))
    yield server
    server.stop()


@pytest.fixture
def visit(browser, live):
    """Function: visit(color_scheme="dark", ...) -> the page in a browser context of its own.

    Whatever a test does: the page asks nobody but its service, throws nothing, and its policy has nothing to refuse.
    """
    contexts = []

    def go(url=live.url, **context):
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("pageerror", lambda error: go.heard.append(str(error)))
        page.on("console", lambda line: go.heard.append(line.text))
        page.on("request", lambda request: go.asked.append(request.url))
        page.goto(url)
        return page

    go.heard, go.asked = [], []
    yield go
    for context in contexts:
        context.close()
    assert [
        line for line in go.heard if not line.startswith("Failed to load resource")
    ] == []  # Chromium's line for every 4xx
    assert [url for url in go.asked if not url.startswith(("http://127.0.0.1:", "blob:"))] == []


# ---- verdicts ----


@pytest.mark.parametrize("name", ["china.jpg", "chelsea.png"])
def test_a_picked_photo_gets_the_verdict_of_classify_py_with_its_numbers_in_the_details(
    visit, script, photos, name
):
    page = visit()
    with page.expect_response(CLASSIFY) as response:
        pick(page, photos[name])
    found = card(page, name)
    asked = ("--image_path", photos[name], "--model_path", BASELINE, "--json", "--details")
    known = json.loads(script("classify.py", *asked).stdout)
    assert_shows(found, known)
    assert name in page.get_by_role("log").inner_text()  # told to those who do not see the card
    assert found.locator("img").evaluate("image => image.naturalWidth") > 0
    found.get_by_text("Details").click()
    assert_says(
        found,
        str(known["p_fake"]),
        str(known["threshold"]),
        known["model_version"],
        "decode",
        "The file says",
        f"C2PA {known['provenance']['c2pa']['state']}",
        response.value.headers["x-request-id"],
    )


@pytest.mark.parametrize(
    "given, words",
    [
        ({}, ["Real", "90% confidence", "Looks like a photograph"]),
        (
            {"classification": "fake", "confidence": 0.9999},
            ["Fake", "over 99% confidence", "Looks AI-generated"],
        ),
        (
            {"uncertain": True, "reason": "its sides are short"},
            ["Uncertain", "leaning to real, 90%", "Its sides are short."],
        ),
    ],
    ids=["real", "fake", "uncertain"],
)
def test_each_kind_of_verdict_in_words(visit, photos, given, words):
    page = visit()
    page.route(CLASSIFY, answer(**given))
    pick(page, photos["china.jpg"])
    assert_says(card(page, "china.jpg"), *words)


def test_what_the_file_says_of_its_making_stands_in_one_line_of_the_details(visit, photos):
    page = visit()
    page.route(
        CLASSIFY,
        answer(
            provenance={
                "c2pa": {
                    "state": "valid",
                    "failures": [],
                    "says": "made by a generator",
                    "signer": "<b>Studio</b>",
                    "claim_generator": None,
                },
                "metadata": [
                    {"where": "EXIF Software", "says": "saved by software", "name": "GIMP 3.0"}
                ],
            }
        ),
    )
    pick(page, photos["china.jpg"])
    found = card(page, "china.jpg")
    found.get_by_text("Details").click()
    assert_says(
        found,
        "90% confidence",
        "C2PA valid, made by a generator, signed by <b>Studio</b>; EXIF Software: saved by software"
        " (GIMP 3.0)",
    )


def test_several_images_are_checked_two_at_a_time_and_each_gets_its_own_verdict(
    visit, live, photos
):
    names = ["china.jpg", "chelsea.png", "camera.png", "grace_hopper.jpg"]
    page = visit()
    page.evaluate(COUNT)
    pick(page, *(photos[name] for name in names))
    card(page, names[3])
    assert page.evaluate("most") == 2
    assert page.locator(".card h3").all_inner_texts() == names
    for name in names:
        known = live.session.post(
            f"{live.url}/classify?details=1",
            files={"image": photos[name].read_bytes()},
            timeout=PATIENCE,
        )
        assert_shows(card(page, name), known.json())
    assert_says(page.get_by_role("region", name="Results"), "4 of 4 done")


@pytest.mark.parametrize("how, name", [("paste", "Pasted image"), ("drop", "dropped.jpg")])
def test_an_image_can_be_pasted_or_dropped(visit, photos, how, name):
    page = visit()
    taken = page.evaluate(
        HAND_OVER, [how, "dropped.jpg", base64.b64encode(photos["china.jpg"].read_bytes()).decode()]
    )
    assert taken or how == "paste"  # or the browser would leave the page for the dropped file
    assert_says(card(page, name), "%")


def test_a_file_that_the_browser_cannot_preview_has_a_verdict_all_the_same(visit, photos, tmp_path):
    from PIL import Image

    Image.open(photos["china.jpg"]).save(tmp_path / "scan.tiff")
    page = visit()
    pick(page, tmp_path / "scan.tiff")
    assert_says(card(page, "scan.tiff"), "No preview", "%")


def test_it_says_what_a_verdict_is_worth_and_that_this_model_is_a_demonstration(visit):
    page = visit()
    below = page.get_by_label("Choose images").bounding_box()["y"]
    assert page.get_by_text(NOTICE).bounding_box()["y"] < below
    assert_says(
        page.get_by_role("region", name="What a verdict is worth"),
        "calibrated",
        "most alarms are false",
        "not evidence",
    )
    assert_says(page.get_by_role("main"), "JPEG", "up to 10 MB", "not kept")
    assert page.get_by_role("contentinfo").inner_text().startswith("Model v")


# ---- what goes wrong ----


def test_what_is_no_image_is_told_in_the_services_words(visit, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    page = visit()
    pick(page, tmp_path / "notes.txt")
    found = card(page, "notes.txt")
    assert_says(found, "No verdict", "Not an image format we take", "JPEG")
    assert not found.get_by_role("button", name="Try again").is_visible()  # it would not help


def test_a_file_that_is_too_large_is_told_so_and_never_sent(visit, tmp_path):
    (tmp_path / "huge.jpg").write_bytes(bytes(11_000_000))
    page, sent = visit(), []
    page.on(
        "request", lambda request: sent.append(request.url) if "classify" in request.url else None
    )
    pick(page, tmp_path / "huge.jpg")
    assert_says(card(page, "huge.jpg"), "Too large: 10.5 MB", "at most 10 MB")
    assert sent == []


def test_a_drop_without_a_file_is_explained(visit):
    page = visit()
    assert page.evaluate(HAND_OVER, ["drop", "", ""])
    assert "no image file" in page.get_by_role("alert").inner_text()


def test_a_service_that_is_gone_can_be_tried_again(visit, photos):
    page = visit()
    page.route(CLASSIFY, lambda route: route.abort("connectionrefused"))
    pick(page, photos["china.jpg"])
    found = card(page, "china.jpg")
    assert_says(found, "No verdict", "cannot be reached")
    page.unroute(CLASSIFY)
    found.get_by_role("button", name="Try again").click()
    assert_says(card(page, "china.jpg"), "%")
    assert not found.get_by_role("button", name="Try again").is_visible()


@pytest.mark.parametrize("status", [503, 429], ids=["the service", "an ingress that limits rates"])
@pytest.mark.parametrize("times", [1, 9], ids=["for a while", "for good"])
def test_a_busy_service_is_asked_again_three_times(visit, photos, times, status):
    page, asked = visit(), []

    def busy(route):
        asked.append(route)
        if len(asked) <= times:
            route.fulfill(
                status=status, headers={"Retry-After": "1"}, json={"error": "busy: no turn came"}
            )
        else:
            answer()(route)

    page.route(CLASSIFY, busy)
    pick(page, photos["china.jpg"])
    page.locator(".card").get_by_text("Busy, trying again").wait_for()
    words = ["90% confidence"] if times < 3 else ["No verdict", "Busy: no turn came.", "Try again"]
    assert_says(card(page, "china.jpg"), *words)
    assert len(asked) == min(times, 3) + 1


def test_an_answer_that_is_not_ours_is_no_verdict(visit, photos):
    page = visit()
    page.route(
        CLASSIFY, lambda route: route.fulfill(body="<html>Sign in</html>", content_type="text/html")
    )
    pick(page, photos["china.jpg"])
    assert_says(card(page, "china.jpg"), "No verdict", "no usable answer (status 200)")


def test_the_name_of_a_file_is_text_and_never_markup(visit, photos):
    page, name = visit(), "<img src=x onerror=document.title='harm'>.jpg"
    pick(page, {"name": name, "mimeType": "image/jpeg", "buffer": photos["china.jpg"].read_bytes()})
    assert card(page, name).get_by_role("heading").inner_text() == name
    assert page.title() != "harm" and page.locator("img[src=x]").count() == 0


def test_cleared_images_are_gone_and_those_still_waiting_are_never_sent(visit, photos):
    page, held = visit(), []
    page.route(CLASSIFY, lambda route: held.append(route))
    pick(page, *([photos["china.jpg"]] * 5))
    page.get_by_text("Waiting its turn").first.wait_for()
    while len(held) < 2:
        page.wait_for_timeout(20)
    page.get_by_role("button", name="Clear").click()
    page.wait_for_timeout(200)
    assert len(held) == 2 and page.locator(".card").count() == 0
    assert not page.get_by_role("region", name="Results").is_visible()


# ---- a token ----


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """The service behind a key."""
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys").write_text(f"visitor {hashlib.sha256(b'open sesame').hexdigest()}\n")
    server = Live(folder, API_KEYS_FILE=str(folder / "keys"))
    yield server
    server.stop()


def test_a_token_is_asked_for_once_kept_in_memory_alone_and_the_images_sent_again(
    visit, locked, photos
):
    page = visit(locked.url)
    pick(page, photos["china.jpg"], photos["chelsea.png"], photos["camera.png"])
    field = page.get_by_label("Access token")
    field.wait_for()
    assert field.evaluate("field => field.type === 'password' && field === document.activeElement")
    page.keyboard.type("a guess")
    page.keyboard.press("Enter")
    page.get_by_text("not accepted").wait_for()
    page.keyboard.type("open sesame")
    page.keyboard.press("Enter")
    for name in ("china.jpg", "chelsea.png", "camera.png"):
        assert_says(card(page, name), "%")
    pick(page, photos["rocket.jpg"])
    assert_says(card(page, "rocket.jpg"), "%")
    assert not field.is_visible() and field.input_value() == ""
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [
        0,
        0,
        "",
    ]


# ---- for everyone ----


def test_all_of_it_works_with_the_keyboard(visit, photos):
    page = visit()
    page.on(
        "filechooser", lambda chooser: None
    )  # now, so that the dialogue is surely caught when the key opens it
    page.keyboard.press("Tab")  # the link in the head
    outline = "drop => getComputedStyle(drop).outlineStyle"
    assert page.locator("#drop").evaluate(outline) == "none"
    page.keyboard.press("Tab")
    assert page.locator("#drop").evaluate(outline) == "solid"  # the focus can be seen
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(photos["china.jpg"])
    found = card(page, "china.jpg")
    page.keyboard.press("Tab")  # "Clear"
    page.keyboard.press("Tab")
    assert page.locator(":focus").inner_text().startswith("Details")
    page.keyboard.press("Enter")
    assert found.get_by_text("Probability of fake", exact=True).is_visible()


@pytest.mark.parametrize("width", [320, 1200])
def test_nothing_is_wider_than_the_screen(visit, photos, width):
    page = visit(viewport={"width": width, "height": 700})
    fill(page, photos)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    left, right = (page.locator(".card").nth(n).bounding_box() for n in (0, 1))
    assert (left["x"] == right["x"]) == (
        width < 600
    )  # one column on a phone, two beside each other elsewhere
    assert page.locator(".card h3").evaluate_all(
        "all => all.every(h3 => h3.scrollWidth <= h3.clientWidth)"
    )


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_the_dark_is_dark(visit, photos, scheme, filled):
    from axe_playwright_python.sync_playwright import Axe

    page = visit(color_scheme=scheme, reduced_motion="reduce")
    if filled:
        fill(page, photos)
    found = Axe().run(page).response
    assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in found["violations"]] == []
    assert len(found["passes"]) > 10  # it did look
    grounds = [
        page.locator(place).evaluate("e => getComputedStyle(e).backgroundColor")
        for place in ("body", "#drop")
    ]
    for ground in grounds:
        brightness = sum(map(int, ground.removeprefix("rgb(").removesuffix(")").split(","))) / 3
        assert brightness < 60 if scheme == "dark" else brightness > 200


@pytest.mark.parametrize("wish, moves", [("no-preference", True), ("reduce", False)])
def test_nothing_moves_for_those_who_wish_so(visit, photos, wish, moves):
    page, held = visit(reduced_motion=wish), []
    page.route(CLASSIFY, lambda route: held.append(route))
    pick(page, photos["china.jpg"])
    found = card(page, "china.jpg", "checking")
    assert bool(found.evaluate("card => card.getAnimations({subtree: true}).length")) == moves


def test_the_console_stays_empty_and_nobody_else_is_asked(visit, live, photos):
    page = visit()
    pick(page, photos["china.jpg"])
    assert_says(card(page, "china.jpg"), "%")
    assert visit.heard == []
    assert {url.removeprefix(live.url).split(":")[0] for url in visit.asked} == {
        "/",
        "/classify?details=1",
        "blob",
    }
