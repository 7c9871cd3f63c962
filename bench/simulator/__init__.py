"""Discrete-event simulator: requests on groups of ranks, from one group to thousands of GPUs.

Neither torch nor SGLang; `simulate` is the way in, docs/planner.md tells what is modelled.
"""

from bench.simulator.job import Job, Lengths, Request, make_requests
from bench.simulator.report import RankReport, Report
from bench.simulator.simulate import Settings, simulate

__all__ = [
    "Job",
    "Lengths",
    "RankReport",
    "Report",
    "Request",
    "Settings",
    "make_requests",
    "simulate",
]
