"""Random and mutated input. The decoder gives a picture or an ImageError; the service responds as
documented.

Every run has the same examples, so anybody can repeat a failure. `pytest -s` prints their number.
"""

import re
import resource
import sys
import time
from collections import Counter

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
from written import FILES

from detector.base.errors import ImageError
from detector.images import decoding

PIXELS = 1_000_000  # of the largest image; they limit the cost of an example
ODD = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 40_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
TOKEN = "correct-horse"


def run(examples, strategy, check):
    """Call `check` with this many values, the same at every run."""

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
    """An offset, mostly in the header, which the parsers read."""
    return draw(st.one_of(st.integers(0, min(200, len(data))), st.integers(0, len(data))))


def number(draw, data, files):
    """Overwrite up to four bytes with a number at a limit of integer types."""
    at, size = place(draw, data), draw(st.sampled_from([1, 2, 4]))
    order = draw(st.sampled_from(["big", "little"]))
    value = draw(st.sampled_from(ODD)) % (1 << 8 * size)
    return data[:at] + value.to_bytes(size, order) + data[at + size :]


def flip(draw, data, files):
    if not data:
        return data
    at = min(place(draw, data), len(data) - 1)
    return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :]


def cut(draw, data, files):
    return data[: place(draw, data)]


def drop(draw, data, files):
    at = place(draw, data)
    return data[:at] + data[at + draw(st.integers(1, 64)) :]


def repeat(draw, data, files):
    at, size = place(draw, data), draw(st.integers(1, 64))
    return data[:at] + data[at : at + size] * draw(st.integers(2, 200)) + data[at + size :]


def splice(draw, data, files):
    """The start of one file and the end of another."""
    other = draw(st.sampled_from(files))
    return data[: place(draw, data)] + other[place(draw, other) :]


CHANGES = st.sampled_from([number, flip, cut, drop, repeat, splice])


@st.composite
def mutated(draw, files):
    data = draw(st.sampled_from(files))
    for change in draw(st.lists(CHANGES, min_size=1, max_size=5)):
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
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def decode_all(examples, files):
    """Decode mutated and random files -> number of each outcome: 'image' or an error's name."""
    outcomes, limit = Counter(), 75 * additions()

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
        assert time.process_time() - started < limit, "decoding took too long"
        outcomes[kind] += 1

    random = st.binary(max_size=300)
    run(examples, st.one_of(mutated(files), mutated(files), announced(files), random), check)
    return outcomes


@pytest.mark.parametrize(
    "examples",
    [pytest.param(1_000, marks=pytest.mark.slow), pytest.param(60_000, marks=pytest.mark.long)],
)
def test_any_bytes_decode_to_a_picture_or_an_image_error(whole, examples, as_users_have_it):
    before = memory()
    outcomes = decode_all(examples, whole)
    print(f"\ndecoded {outcomes}; peak memory grew by {memory() - before:.0f} MB")
    assert set(outcomes) == {"image", "BrokenImage", "UnsupportedImage", "ImageTooLarge"}
    assert min(outcomes.values()) > examples / 1000


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
    """For `binary` in the document, schemathesis sends pictures, mutated pictures and noise."""
    bodies = st.one_of(st.sampled_from(whole), mutated(whole), st.binary(max_size=300))
    schemathesis.openapi.format("binary", bodies)
    yield
    unregister_string_format("binary")


@schemathesis.check
def no_server_error(context, response, case):
    """503 is allowed, because the queue may be full."""
    assert response.status_code < 500 or response.status_code == 503, response.text


CHECKS = [
    no_server_error,
    conformance.status_code_conformance,
    conformance.content_type_conformance,
    conformance.response_headers_conformance,
    conformance.response_schema_conformance,
]


def probe(live, operation, examples, statuses):
    """Send valid requests, invalid requests, and requests at the limits of each rule."""
    token = {"Authorization": f"Bearer {TOKEN}"}

    def check(case):
        response = case.call(base_url=live.url, session=live.session, headers=token)
        if response.status_code == 405:  # of a wrong method, which no operation documents
            assert case.method.lower() != operation.method.lower() and response.headers["allow"]
        else:
            case.validate_response(response, checks=CHECKS)
        statuses[response.status_code] += 1

    modes = list(GenerationMode)
    for mode in modes:
        run(examples, operation.as_strategy(generation_mode=mode), check)
    schema, rules = operation.schema, operation.schema.config.generation_for(operation=operation)
    for case in schema.iter_coverage_cases(
        operation, generation_modes=modes, generation_config=rules
    ):
        check(case)


def resident(live):
    """Megabytes that the service holds."""
    text = live.session.get(f"{live.url}/metrics", timeout=PATIENCE).text
    (size,) = re.findall(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)
    return float(size) / 1e6


def verdict(live, data):
    response = live.post(data)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    "examples",
    [pytest.param(25, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.long)],
)
def test_the_live_service_responds_as_documented_and_its_verdicts_do_not_change(
    live, images, photos, examples
):
    photo = photos["china.jpg"].read_bytes()
    first = [verdict(live, photo) for _ in range(50)][0]
    before, statuses = resident(live), {}
    for result in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations():
        operation = result.ok()
        name = f"{operation.method.upper()} {operation.path}"
        probe(live, operation, examples, statuses.setdefault(name, Counter()))
    grown = resident(live) - before
    print(f"\nmemory grew by {grown:.1f} MB; {statuses}")
    assert {200, 400, 415} <= set(statuses["POST /classify"])
    assert {200, 400} <= set(statuses["POST /feedback"])
    assert len(statuses) == len(OPERATIONS)
    assert min(counts.total() for counts in statuses.values()) >= 2 * examples
    assert verdict(live, photo) == first and live.process.poll() is None
    assert grown < 40, grown  # a leak of one upload in ten would be more
