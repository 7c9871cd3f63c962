"""Discrete-event simulator: requests on groups of ranks, from one group to thousands of GPUs.

Room: planner; pure, neither torch nor SGLang. `simulate` is the way in; docs/simulator.md tells
what is modelled.
"""

from sidp_sgl.planner.simulator.job import Job, Lengths, Request, make_requests
from sidp_sgl.planner.simulator.report import RankReport, Report
from sidp_sgl.planner.simulator.settings import Settings
from sidp_sgl.planner.simulator.simulate import simulate

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
