"""What all tests share."""

from hypothesis import settings

from tests.testbed.fixture import testbed

__all__ = ["testbed"]

# A machine that others use too is slow at moments: time is no property of what these tests examine.
settings.register_profile("eurotrain", deadline=None)
settings.load_profile("eurotrain")
