"""All engines that these tests start in their own process."""

from tests.support import forked

forked.enable()
