"""The engine's process of a job: the only files of `batch` that import SGLang."""
