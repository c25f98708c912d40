"""For tests of the page: the actions of a visitor, and checks of the page's text."""

import pytest

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-breakpad",
]  # makes no connections of its own
# A file made inside the page, transferred as the clipboard or a file manager would do.
HAND_OVER = """([action, name, data]) => {
  const transfer = new DataTransfer(), options = {bubbles: true, cancelable: true};
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
  if (name) transfer.items.add(new File([bytes], name, {type: "image/jpeg"}));
  else transfer.setData("text/plain", "https://example.org/a.jpg");
  const event = action === "paste"
    ? new ClipboardEvent("paste", {clipboardData: transfer, ...options})
    : new DragEvent("drop", {dataTransfer: transfer, ...options});
  document.querySelector("#drop").dispatchEvent(event);
  return event.defaultPrevented;
}"""
# Counts in `most` how many requests of the page ran at once.
COUNT = """() => {
  const send = fetch;
  let now = window.most = 0;
  window.fetch = (...given) => {
    most = Math.max(most, ++now);
    return send(...given).finally(() => now--);
  };
}"""
# The request of the page, and a response of the documented shape.
CLASSIFY = "**/classify?details=1"
EXPLAIN = "**/explain"
VERDICT = {
    "classification": "real",
    "confidence": 0.9,
    "p_fake": 0.1,
    "threshold": 0.5,
    "uncertain": False,
    "reason": None,
    "model_version": "v9",
    "provenance": {"c2pa": {"state": "none"}, "metadata": []},
    "timings": {"encode_s": 0.07},
}
MAP = {
    "rows": [[0.1 * x - 0.2 * y for x in range(7)] for y in range(7)],
    "passes": 26,
    "seconds": 1.6,
    "meaning": "This map proves nothing.",
}


def pick(page, *files):
    """Choose files through the input of the file dialogue."""
    page.get_by_label("Choose images").set_input_files(files)


def card(page, name, state="done"):
    """The card of that image, once it is in that state."""
    heading = page.get_by_role("heading", name=name, exact=True)
    element = page.locator(f".card[data-state={state}]", has=heading)
    element.wait_for()
    return element


def assert_says(element, *words):
    text = element.inner_text()
    for word in words:
        assert word in text, text


def assert_shows(element, known):
    """The card shows the verdict of ?details=1 or of `classify.py --details --json`."""
    percent = f"{known['confidence']:.0%}"
    if known["uncertain"]:
        leaning = f"leaning to {known['classification']}, {percent}"
        assert_says(element, "Uncertain", leaning, known["reason"][1:])
    else:
        assert_says(element, known["classification"].title(), f"{percent} confidence")
    bar = element.locator(".bar")
    share = bar.locator("i").bounding_box()["width"] / bar.bounding_box()["width"]
    assert share == pytest.approx(known["confidence"], abs=0.01)


def answer(**changes):
    """A handler for page.route: this verdict, without a request to the service."""
    headers = {"X-Request-ID": "from-the-test"}
    return lambda route: route.fulfill(json={**VERDICT, **changes}, headers=headers)


def fill(page, photos):
    """Show a card of each kind with open details, "Try again" and the field for the token."""
    page.route(CLASSIFY, answer(uncertain=True, reason="its sides are short"))
    pick(page, photos["china.jpg"])
    card(page, "china.jpg")
    for name, handler in (
        ("chelsea.png", answer()),
        ("flower.jpg", answer(classification="fake")),
        ("rocket.jpg", lambda route: route.fulfill(status=500, json={"error": "internal error"})),
        (
            "camera.png",
            lambda route: route.fulfill(status=401, json={"error": "a token is needed"}),
        ),
    ):
        page.route(CLASSIFY, handler)
        long, data = f"{'long_name_' * 12}{name}", photos[name].read_bytes()
        pick(page, {"name": long, "mimeType": "image/jpeg", "buffer": data})
        card(page, long, "waiting" if name == "camera.png" else "done")
    for summary in page.locator("summary").all():
        summary.click()
    page.route(EXPLAIN, lambda route: route.fulfill(json=MAP))
    page.get_by_role("button", name="What moved it?").first.click()
    page.get_by_role("img", name="What moved the verdict").wait_for()
    page.evaluate(HAND_OVER, ["drop", "", ""])
