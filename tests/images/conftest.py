"""A fixture for tests of decoding."""

import warnings

import pytest


@pytest.fixture
def as_users_have_it():
    """Warnings are not errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
