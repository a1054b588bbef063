"""The ranks' world, as in the tests of training."""

from tests.train.conftest import world

__all__ = ["world"]
