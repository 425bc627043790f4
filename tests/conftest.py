"""What all tests share."""

from hypothesis import settings

# A machine that others use too is slow at moments: time is no property of what these tests examine.
settings.register_profile("eurotrain", deadline=None)
settings.load_profile("eurotrain")
