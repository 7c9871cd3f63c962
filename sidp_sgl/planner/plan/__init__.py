"""`sidp-sgl plan`: compares the ways to split a model over GPUs and says which is best, and why."""
