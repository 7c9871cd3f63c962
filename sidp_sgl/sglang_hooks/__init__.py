"""The only code that imports SGLang; one file per place that is hooked."""
