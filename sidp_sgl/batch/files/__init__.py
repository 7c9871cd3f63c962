"""The files of a job: requests in, records out, and what the next run has to know."""
