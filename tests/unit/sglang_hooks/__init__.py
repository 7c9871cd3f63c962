"""SGLang finds its platform, which is ours, while it is imported: it has to come first."""

import sglang  # noqa: F401
