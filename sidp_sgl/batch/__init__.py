"""Offline jobs: JSONL in, JSONL out. Docs: docs/run-batch.md."""
