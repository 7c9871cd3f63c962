"""Every hook into SGLang, and what SiDP does there."""

# First: importing it resolves its platform, which imports the CPU platform from here.
import sglang  # noqa: F401
