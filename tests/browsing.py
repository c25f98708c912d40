"""For tests of the page: what a visitor does in it, and what it must then say."""

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
]  # asks nobody but the page
# a file made inside the page, handed over as the system's clipboard or file manager would
HAND_OVER = """([how, name, data]) => {
  const transfer = new DataTransfer();
  if (name) transfer.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name, {type: "image/jpeg"}));
  else transfer.setData("text/plain", "https://example.org/a.jpg");
  const event = how === "paste" ? new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true})
                                : new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
  document.querySelector("#drop").dispatchEvent(event);
  return event.defaultPrevented;
}"""
# how many requests of the page were under way at once, in `most`
COUNT = """() => {
  const send = fetch;
  let now = window.most = 0;
  window.fetch = (...given) => { most = Math.max(most, ++now); return send(...given).finally(() => now--); };
}"""
# what the page asks, and an answer of the documented shape
CLASSIFY = "**/classify?details=1"
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


def pick(page, *files):
    """Through the file dialogue's input, found by what a visitor reads on it."""
    page.get_by_label("Choose images").set_input_files(files)


def card(page, name, state="done"):
    """The card of that image, once it is in that state."""
    found = page.locator(
        f".card[data-state={state}]", has=page.get_by_role("heading", name=name, exact=True)
    )
    found.wait_for()
    return found


def assert_says(element, *words):
    text = element.inner_text()
    for word in words:
        assert word in text, text


def assert_shows(found, known):
    """The card says what this ?details=1 (or `classify.py --details --json`) says."""
    percent = f"{known['confidence']:.0%}"
    if known["uncertain"]:
        assert_says(
            found,
            "Uncertain",
            f"leaning to {known['classification']}, {percent}",
            known["reason"][1:],
        )
    else:
        assert_says(found, known["classification"].title(), f"{percent} confidence")
    bar = found.locator(".bar")
    share = bar.locator("i").bounding_box()["width"] / bar.bounding_box()["width"]
    assert share == pytest.approx(known["confidence"], abs=0.01)


def answer(**changes):
    """A handler for page.route: this verdict, without asking the service."""
    return lambda route: route.fulfill(
        json={**VERDICT, **changes}, headers={"X-Request-ID": "from-the-test"}
    )


def fill(page, photos):
    """A card of each kind with its details open, one to try again, the field for the token."""
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
        pick(
            page,
            {
                "name": f"{'long_name_' * 12}{name}",
                "mimeType": "image/jpeg",
                "buffer": photos[name].read_bytes(),
            },
        )
        card(page, f"{'long_name_' * 12}{name}", "waiting" if name == "camera.png" else "done")
    for summary in page.locator("summary").all():
        summary.click()
    page.evaluate(HAND_OVER, ["drop", "", ""])
