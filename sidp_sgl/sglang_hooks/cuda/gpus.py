"""What is known of kinds of GPUs: on which --sidp has been verified, how fast their links are; and
what is said where this machine's are others, or slower."""

import logging

import torch

from sidp_sgl.scheduler.member import Member

logger = logging.getLogger(__name__)

# As the driver names them: those with a result of `python -m bench.gpu.verify` in bench/results.
VERIFIED: tuple[str, ...] = ()

# GB/s per direction between two GPUs of a node, as vendors say; others are not judged.
LINK_GBPS = {
    "NVIDIA A100-SXM4-40GB": 300,
    "NVIDIA A100-SXM4-80GB": 300,
    "NVIDIA H100 80GB HBM3": 450,
    "NVIDIA H200": 450,
    "NVIDIA H20": 450,
    "NVIDIA B200": 900,
}
_SLOW = 0.5  # of the link's rate


def say(member: Member, fetch_rate: float | None) -> None:
    """At the end of a rank's start. `fetch_rate`: of its fetches in bytes per second, None where it
    says nothing of the link."""
    name = torch.cuda.get_device_name()
    if name not in VERIFIED and (member.dp_rank, member.tp_rank) == (0, 0):
        logger.warning(
            "--sidp has not been verified on %s yet: `python -m bench.gpu.verify` does it in eight "
            "minutes, please report its result",
            name,
        )
    link = 1e9 * LINK_GBPS.get(name, 0)
    if fetch_rate is not None and fetch_rate < _SLOW * link:
        logger.warning(
            "blocks are fetched at %.0f GB/s, where links of %s have %.0f: see "
            "`nvidia-smi topo -m` and `nvidia-smi nvlink -s`",
            fetch_rate / 1e9,
            name,
            link / 1e9,
        )
