from tests.testbed.fixture import testbed

__all__ = ["testbed"]
