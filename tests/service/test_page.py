"""The page at /, in a real browser with the live service: the actions of visitors, and the text."""

import base64
import json

import numpy as np
import pytest
from browsing import (
    CLASSIFY,
    COUNT,
    EXPLAIN,
    HAND_OVER,
    MAP,
    answer,
    assert_says,
    assert_shows,
    card,
    fill,
    pick,
)
from engines import keys_file
from live import Live
from made_up import BASELINE, NOTICE
from patience import PATIENCE
from PIL import Image

from detector.images.occlusion import MEANING


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    server = Live(tmp_path_factory.mktemp("page"))
    yield server
    server.stop()


@pytest.fixture
def visit(browser, live):
    """Function: visit(color_scheme="dark", ...) -> the page in a browser context of its own.

    In every test the page sends requests only to its service, has no JavaScript error, and does
    not break its content security policy.
    """
    contexts = []

    def go(url=live.url, **context):
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("pageerror", lambda error: go.messages.append(str(error)))
        page.on("console", lambda line: go.messages.append(line.text))
        page.on("request", lambda request: go.urls.append(request.url))
        page.goto(url)
        return page

    go.messages, go.urls = [], []
    yield go
    for context in contexts:
        context.close()
    # Chromium writes "Failed to load resource" for every 4xx.
    assert all(line.startswith("Failed to load resource") for line in go.messages), go.messages
    assert all(url.startswith(("http://127.0.0.1:", "blob:")) for url in go.urls), go.urls


# ---- verdicts ----


@pytest.mark.parametrize("name", ["china.jpg", "chelsea.png"])
def test_a_chosen_photo_gets_the_verdict_and_the_details_of_classify_py(
    visit, script, photos, name
):
    page = visit()
    with page.expect_response(CLASSIFY) as response:
        pick(page, photos[name])
    element = card(page, name)
    flags = ("--image_path", photos[name], "--model_path", BASELINE, "--json", "--details")
    known = json.loads(script("classify.py", *flags).stdout)
    assert_shows(element, known)
    assert name in page.get_by_role("log").inner_text()  # for screen readers
    assert element.locator("img").evaluate("image => image.naturalWidth") > 0
    element.get_by_text("Details").click()
    assert_says(
        element,
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
        ({"decision": "review"}, ["Real", "90% confidence; decision: review"]),
    ],
    ids=["real", "fake", "uncertain", "review"],
)
def test_the_card_of_each_kind_of_verdict(visit, photos, given, words):
    page = visit()
    page.route(CLASSIFY, answer(**given))
    pick(page, photos["china.jpg"])
    assert_says(card(page, "china.jpg"), *words)


def test_the_claims_of_a_file_are_a_line_of_the_details(visit, photos):
    page = visit()
    c2pa = {
        "state": "valid",
        "failures": [],
        "says": "made by a generator",
        "signer": "<b>Studio</b>",
        "claim_generator": None,
    }
    metadata = [{"where": "EXIF Software", "says": "saved by software", "name": "GIMP 3.0"}]
    page.route(CLASSIFY, answer(provenance={"c2pa": c2pa, "metadata": metadata}))
    pick(page, photos["china.jpg"])
    element = card(page, "china.jpg")
    element.get_by_text("Details").click()
    signed = "C2PA valid, made by a generator, signed by <b>Studio</b>"
    fields = "EXIF Software: saved by software (GIMP 3.0)"
    assert_says(element, "90% confidence", f"{signed}; {fields}")


def test_several_images_are_checked_two_at_a_time(visit, live, photos):
    names = ["china.jpg", "chelsea.png", "camera.png", "grace_hopper.jpg"]
    page = visit()
    page.evaluate(COUNT)
    pick(page, *(photos[name] for name in names))
    card(page, names[3])
    assert page.evaluate("most") == 2
    assert page.locator(".card h3").all_inner_texts() == names
    for name in names:
        url, files = f"{live.url}/classify?details=1", {"image": photos[name].read_bytes()}
        known = live.session.post(url, files=files, timeout=PATIENCE).json()
        assert_shows(card(page, name), known)
    assert_says(page.get_by_role("region", name="Results"), "4 of 4 done")


@pytest.mark.parametrize("action, name", [("paste", "Pasted image"), ("drop", "dropped.jpg")])
def test_an_image_can_be_pasted_or_dropped(visit, photos, action, name):
    page = visit()
    data = base64.b64encode(photos["china.jpg"].read_bytes()).decode()
    prevented = page.evaluate(HAND_OVER, [action, "dropped.jpg", data])
    # Otherwise the browser would leave the page and open the dropped file.
    assert prevented or action == "paste"
    assert_says(card(page, name), "%")


def test_a_file_without_a_preview_gets_a_verdict(visit, photos, tmp_path):
    from PIL import Image

    Image.open(photos["china.jpg"]).save(tmp_path / "scan.tiff")
    page = visit()
    pick(page, tmp_path / "scan.tiff")
    assert_says(card(page, "scan.tiff"), "No preview", "%")


def test_the_page_explains_a_verdict_and_shows_the_notice_of_the_model(visit):
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


def colours(canvas):
    """Pixels of a canvas, int [side, side, 4]: red, green, blue, alpha."""
    side = canvas.evaluate("canvas => canvas.width")
    read = "(canvas, side) => [...canvas.getContext('2d').getImageData(0, 0, side, side).data]"
    return np.reshape(canvas.evaluate(read, side), (side, side, 4))


def test_the_button_shows_what_moved_a_verdict_beside_the_picture(visit, photos):
    page = visit()
    pick(page, photos["china.jpg"])
    element = card(page, "china.jpg")
    with page.expect_response(EXPLAIN) as response:
        element.get_by_role("button", name="What moved it? (china.jpg)").click()
    rows = np.array(response.value.json()["rows"])
    drawn = element.get_by_role("img", name="What moved the verdict")
    drawn.wait_for()
    strength, pixels = np.abs(rows) / np.abs(rows).max(), colours(drawn)
    assert pixels[..., 3] / 255 == pytest.approx(strength, abs=0.01)
    orange = pixels[..., 0] > pixels[..., 2]
    assert (orange == (rows > 0))[strength > 0.2].all()  # purple otherwise
    shown = element.get_by_role("img", name="The part that the model saw")
    left, right = shown.bounding_box(), drawn.bounding_box()
    assert left["y"] == right["y"] and left["x"] < right["x"]
    assert left["width"] == pytest.approx(right["width"]) == pytest.approx(left["height"])
    factor = np.exp(np.abs(rows).max())
    says = [MEANING, "Orange parts speak for fake", f"by a factor of {factor:.1f}", "26 passes"]
    assert_says(element, *says)
    assert f"china.jpg: {MEANING}" in page.get_by_role("log").inner_text()


def test_the_picture_beside_the_map_is_its_middle_square(visit, tmp_path):
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, 40:80], pixels[:, 80:] = (0, 255, 0), (0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    page = visit()
    page.route(CLASSIFY, answer())
    page.route(EXPLAIN, lambda route: route.fulfill(json=MAP))
    pick(page, tmp_path / "wide.png")
    card(page, "wide.png").get_by_role("button", name="What moved it?").click()
    shown = page.get_by_role("img", name="The part that the model saw")
    shown.wait_for()
    assert (colours(shown)[:, 10:-10] == [0, 255, 0, 255]).all()


def test_a_map_that_the_service_refuses_is_explained_and_can_be_tried_again(visit, photos):
    page, busy = visit(), {"error": "busy: another map is being made; try again later"}
    page.route(EXPLAIN, lambda route: route.fulfill(status=503, json=busy))
    pick(page, photos["china.jpg"])
    element = card(page, "china.jpg")
    element.get_by_role("button", name="What moved it?").click()
    element.get_by_text("Busy: another map is being made; try again later.").wait_for()
    page.unroute(EXPLAIN)
    element.get_by_role("button", name="What moved it?").click()
    element.get_by_role("img", name="What moved the verdict").wait_for()
    assert_says(element, "%", MEANING)


def test_without_a_verdict_nothing_is_explained(visit, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    page = visit()
    pick(page, tmp_path / "notes.txt")
    element = card(page, "notes.txt")
    assert not element.get_by_role("button", name="What moved it?").is_visible()


# ---- what goes wrong ----


def test_a_file_that_is_no_image_shows_the_error_of_the_service(visit, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    page = visit()
    pick(page, tmp_path / "notes.txt")
    element = card(page, "notes.txt")
    assert_says(element, "No verdict", "Not an image format we take", "JPEG")
    assert not element.get_by_role("button", name="Try again").is_visible()


def test_a_file_that_is_too_large_is_never_sent(visit, tmp_path):
    (tmp_path / "huge.jpg").write_bytes(bytes(11_000_000))
    page, sent = visit(), []
    page.route(CLASSIFY, lambda route: sent.append(route))
    pick(page, tmp_path / "huge.jpg")
    assert_says(card(page, "huge.jpg"), "Too large: 10.5 MB", "at most 10 MB")
    assert sent == []


def test_a_drop_without_a_file_is_explained(visit):
    page = visit()
    assert page.evaluate(HAND_OVER, ["drop", "", ""])
    assert "no image file" in page.get_by_role("alert").inner_text()


def test_without_a_service_the_visitor_can_try_again(visit, photos):
    page = visit()
    page.route(CLASSIFY, lambda route: route.abort("connectionrefused"))
    pick(page, photos["china.jpg"])
    element = card(page, "china.jpg")
    assert_says(element, "No verdict", "cannot be reached")
    page.unroute(CLASSIFY)
    element.get_by_role("button", name="Try again").click()
    assert_says(card(page, "china.jpg"), "%")
    assert not element.get_by_role("button", name="Try again").is_visible()


@pytest.mark.parametrize("status", [503, 429], ids=["the service", "an ingress that limits rates"])
@pytest.mark.parametrize("times", [1, 9], ids=["for a while", "for good"])
def test_the_page_tries_a_busy_service_three_more_times(visit, photos, times, status):
    page, requests = visit(), []

    def busy(route):
        requests.append(route)
        if len(requests) <= times:
            headers, body = {"Retry-After": "1"}, {"error": "busy: no turn came"}
            route.fulfill(status=status, headers=headers, json=body)
        else:
            answer()(route)

    page.route(CLASSIFY, busy)
    pick(page, photos["china.jpg"])
    page.locator(".card").get_by_text("Busy, trying again").wait_for()
    words = ["90% confidence"] if times < 3 else ["No verdict", "Busy: no turn came.", "Try again"]
    assert_says(card(page, "china.jpg"), *words)
    assert len(requests) == min(times, 3) + 1


def test_a_response_of_another_server_is_no_verdict(visit, photos):
    page, html = visit(), {"body": "<html>Sign in</html>", "content_type": "text/html"}
    page.route(CLASSIFY, lambda route: route.fulfill(**html))
    pick(page, photos["china.jpg"])
    assert_says(card(page, "china.jpg"), "No verdict", "no usable answer (status 200)")


def test_the_name_of_a_file_is_shown_as_text(visit, photos):
    page, name = visit(), "<img src=x onerror=document.title='harm'>.jpg"
    pick(page, {"name": name, "mimeType": "image/jpeg", "buffer": photos["china.jpg"].read_bytes()})
    assert card(page, name).get_by_role("heading").inner_text() == name
    assert page.title() != "harm" and page.locator("img[src=x]").count() == 0


def test_cleared_images_are_removed_and_never_sent(visit, photos):
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
    server = Live(folder, API_KEYS_FILE=keys_file(folder / "keys", visitor="open sesame"))
    yield server
    server.stop()


def test_the_page_asks_for_a_token_once_and_keeps_it_in_memory(visit, locked, photos):
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
    stored = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]")
    assert stored == [0, 0, ""]


# ---- for everyone ----


def test_the_page_works_with_the_keyboard(visit, photos):
    page = visit()
    # A handler from the beginning, so that the dialogue is surely caught.
    page.on("filechooser", lambda chooser: None)
    page.keyboard.press("Tab")  # the link in the header
    outline = "drop => getComputedStyle(drop).outlineStyle"
    assert page.locator("#drop").evaluate(outline) == "none"
    page.keyboard.press("Tab")
    assert page.locator("#drop").evaluate(outline) == "solid"  # the focus can be seen
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(photos["china.jpg"])
    element = card(page, "china.jpg")
    page.keyboard.press("Tab")  # "Clear"
    page.keyboard.press("Tab")
    assert page.locator(":focus").inner_text().startswith("Details")
    page.keyboard.press("Enter")
    assert element.get_by_text("Probability of fake", exact=True).is_visible()


@pytest.mark.parametrize("width", [320, 1200])
def test_nothing_is_wider_than_the_screen(visit, photos, width):
    page = visit(viewport={"width": width, "height": 700})
    fill(page, photos)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    left, right = (page.locator(".card").nth(n).bounding_box() for n in (0, 1))
    assert (left["x"] == right["x"]) == (width < 600)  # a phone has a single column
    fits = "all => all.every(h3 => h3.scrollWidth <= h3.clientWidth)"
    assert page.locator(".card h3").evaluate_all(fits)


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_reports_no_violation_and_dark_mode_is_dark(visit, photos, scheme, filled):
    from axe_playwright_python.sync_playwright import Axe

    page = visit(color_scheme=scheme, reduced_motion="reduce")
    if filled:
        fill(page, photos)
    report = Axe().run(page).response
    assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in report["violations"]] == []
    assert len(report["passes"]) > 10  # the checks did run
    for place in ("body", "#drop"):
        colour = page.locator(place).evaluate("e => getComputedStyle(e).backgroundColor")
        brightness = sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3
        assert brightness < 60 if scheme == "dark" else brightness > 200


@pytest.mark.parametrize("wish, moves", [("no-preference", True), ("reduce", False)])
def test_reduced_motion_stops_the_animation(visit, photos, wish, moves):
    page, held = visit(reduced_motion=wish), []
    page.route(CLASSIFY, lambda route: held.append(route))
    pick(page, photos["china.jpg"])
    element = card(page, "china.jpg", "checking")
    assert bool(element.evaluate("card => card.getAnimations({subtree: true}).length")) == moves
