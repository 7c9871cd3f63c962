"""The only code that imports SGLang; one file per place that is hooked."""

# First: importing it resolves its platform, which imports the CPU platform from here.
import sglang  # noqa: F401
