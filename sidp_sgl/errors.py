"""What SiDP raises; every other module may import this one, which imports nothing."""


class SidpError(Exception):
    """A reason why SiDP can't start or go on, in one line that names the remedy."""


class SidpUsageError(SidpError, ValueError):
    """A flag, keyword or combination that the user has to change."""
