"""What is verified and measured on the first GPU that comes: `python -m bench.gpu.verify`."""
