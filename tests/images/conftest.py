"""A fixture of the tests of decoding."""

import warnings

import pytest


@pytest.fixture
def as_users_have_it():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
