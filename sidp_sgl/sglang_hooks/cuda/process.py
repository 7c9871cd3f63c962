"""What a rank's process on a GPU is set to before it meets CUDA."""

import os
import sys

# Streams that share a hardware queue wait for one another: a turn that is waited for, and the
# compute. SGLang sets 8; 32 is the most.
_QUEUES = "32"
# The thread that serves other ranks waits so long for an interpreter that the scheduler keeps busy;
# Python has 5 ms.
_SWITCH_SECONDS = 1e-4


def set_up() -> None:
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = _QUEUES
    sys.setswitchinterval(_SWITCH_SECONDS)
