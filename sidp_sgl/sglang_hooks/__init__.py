"""The engine's only room that imports SGLang: every hook, and what SiDP does there."""

# First: importing it resolves its platform, which imports the CPU platform from here.
import sglang  # noqa: F401
