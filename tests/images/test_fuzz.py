"""Made-up and mutated input: the decoder gives a picture or one of our errors, the service an answer as documented, always.

The same examples at every run: a failure here is one that anybody can repeat. Hypothesis and schemathesis print how many
there were (`pytest -s`), and on a failure the smallest example that they found.
"""

import re
import resource
import sys
import time
import warnings

import hypothesis.strategies as st
import pytest
import schemathesis
from engines import keys_file
from hypothesis import HealthCheck, given, settings
from live import Live
from openapi_document import DOCUMENT, OPERATIONS
from patience import PATIENCE, additions
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks as conformance
from schemathesis.specs.openapi import unregister_string_format
from test_decoding import FILES

from detector.base.errors import ImageError
from detector.images import decoding

PIXELS = 1_000_000  # largest image taken here, so that what an example may cost is known
ODD = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 40_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
TOKEN = "correct-horse"


def run(examples, strategy, check):
    """Call `check` with so many values, always the same ones."""

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def each(value):
        check(value)

    each()


# ---- bytes ----


@pytest.fixture(scope="module")
def whole():
    return [make() for make in FILES.values()]


def place(draw, data):
    """Somewhere in the data, mostly in its first part, where the parsers are."""
    return draw(st.one_of(st.integers(0, min(200, len(data))), st.integers(0, len(data))))


def number(draw, data, files):
    """A number of two or four bytes becomes one that parsers stumble over."""
    at, size, order = (
        place(draw, data),
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from(["big", "little"])),
    )
    value = draw(st.sampled_from(ODD)) % (1 << 8 * size)
    return data[:at] + value.to_bytes(size, order) + data[at + size :]


def flip(draw, data, files):
    at = min(place(draw, data), len(data) - 1)
    return (
        data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]
        if data
        else data
    )


def cut(draw, data, files):
    return data[: place(draw, data)]


def drop(draw, data, files):
    at = place(draw, data)
    return data[:at] + data[at + draw(st.integers(1, 64)) :]


def repeat(draw, data, files):
    at, size = place(draw, data), draw(st.integers(1, 64))
    return data[:at] + data[at : at + size] * draw(st.integers(2, 200)) + data[at + size :]


def splice(draw, data, files):
    """The beginning of one file, the end of another, of the same format or not."""
    other = draw(st.sampled_from(files))
    return data[: place(draw, data)] + other[place(draw, other) :]


@st.composite
def mutated(draw, files):
    data = draw(st.sampled_from(files))
    for change in draw(
        st.lists(st.sampled_from([number, flip, cut, drop, repeat, splice]), min_size=1, max_size=5)
    ):
        data = change(draw, data, files)
    return data


def announced(files):
    """Random bytes behind the first bytes of a real file."""
    return st.builds(
        lambda data, size, rest: data[:size] + rest,
        st.sampled_from(files),
        st.integers(0, 64),
        st.binary(max_size=400),
    )


def memory():
    """Largest resident memory of this process so far, in megabytes."""
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e6
    )


def decode_all(examples, files):
    """-> how many of the mutated files were pictures still, and how many were refused with each of our errors."""
    found, limit = {}, 75 * additions()

    def check(data):
        started = time.process_time()
        try:
            image = decoding.decode_image(data, PIXELS)
        except ImageError as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 500
            kind = type(error).__name__
        else:
            assert image.mode == "RGB" and 0 < image.width * image.height <= PIXELS
            image.tobytes()
            kind = "image"
        assert time.process_time() - started < limit, "it took too long"
        found[kind] = found.get(kind, 0) + 1

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # as users have it: what Pillow thinks of a broken file's metadata
        run(
            examples,
            st.one_of(mutated(files), mutated(files), announced(files), st.binary(max_size=300)),
            check,
        )
    return found


@pytest.mark.parametrize(
    "examples",
    [pytest.param(1_000, marks=pytest.mark.slow), pytest.param(60_000, marks=pytest.mark.long)],
)
def test_whatever_the_bytes_decoding_gives_a_picture_or_one_of_our_errors(whole, examples):
    before = memory()
    found = decode_all(examples, whole)
    print(
        f"\ndecoded {sum(found.values()):,}: {found}; memory's peak grew by"
        f" {memory() - before:.0f} MB"
    )
    assert (
        set(found) == {"image", "BrokenImage", "UnsupportedImage", "ImageTooLarge"}
        and min(found.values()) > examples / 1000
    )


# ---- the live service, by its own document ----


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    server = Live(folder, API_KEYS_FILE=keys_file(folder / "keys", fuzz=TOKEN), BODY_TIMEOUT_S="20")
    server.session.headers["Authorization"] = f"Bearer {TOKEN}"
    yield server
    server.stop()


@pytest.fixture
def images(whole):
    """Where the document says `binary`, schemathesis sends pictures, mutated ones, and anything else."""
    schemathesis.openapi.format(
        "binary", st.one_of(st.sampled_from(whole), mutated(whole), st.binary(max_size=300))
    )
    yield
    unregister_string_format("binary")


@schemathesis.check
def no_mistake_of_ours(context, response, case):
    """503 is an answer: the queue has an end."""
    assert response.status_code < 500 or response.status_code == 503, response.text


CHECKS = [
    no_mistake_of_ours,
    conformance.status_code_conformance,
    conformance.content_type_conformance,
    conformance.response_headers_conformance,
    conformance.response_schema_conformance,
]


def probe(live, operation, examples, statuses):
    """Requests as the document has them, requests that break it on purpose, and the edges of each rule in it."""

    def check(case):
        response = case.call(
            base_url=live.url, session=live.session, headers={"Authorization": f"Bearer {TOKEN}"}
        )
        if (
            response.status_code == 405
        ):  # the edges of the method's rule; any other answer must be a documented one
            assert case.method.lower() != operation.method.lower() and response.headers["allow"]
        else:
            case.validate_response(response, checks=CHECKS)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

    for mode in GenerationMode:
        run(examples, operation.as_strategy(generation_mode=mode), check)
    rules = operation.schema.config.generation_for(operation=operation)
    for case in operation.schema.iter_coverage_cases(
        operation, generation_modes=list(GenerationMode), generation_config=rules
    ):
        check(case)


def resident(live):
    """Megabytes that the service holds."""
    text = live.session.get(f"{live.url}/metrics", timeout=PATIENCE).text
    return (
        float(re.search(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE).group(1))
        / 1e6
    )


def verdict(live, data):
    response = live.post(data)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    "examples",
    [pytest.param(25, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.long)],
)
def test_the_live_service_answers_everything_as_documented_and_is_the_same_afterwards(
    live, images, photos, examples
):
    photo = photos["china.jpg"].read_bytes()
    first = [verdict(live, photo) for _ in range(50)][0]
    before, found = resident(live), {}
    for result in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations():
        operation = result.ok()
        probe(
            live,
            operation,
            examples,
            found.setdefault(f"{operation.method.upper()} {operation.path}", {}),
        )
    grown = resident(live) - before
    print(
        f"\nanswered {sum(sum(statuses.values()) for statuses in found.values()):,}; memory grew by"
        f" {grown:.1f} MB"
    )
    print("\n".join(f"  {name}: {statuses}" for name, statuses in found.items()))
    assert {200, 400, 415} <= set(found["POST /classify"]) and {200, 400} <= set(
        found["POST /feedback"]
    )
    assert len(found) == len(OPERATIONS) and all(
        sum(statuses.values()) >= 2 * examples for statuses in found.values()
    )
    assert verdict(live, photo) == first and live.process.poll() is None
    assert grown < 40, (
        grown
    )  # decoded pictures are small here; a leak of one upload in ten would be more
