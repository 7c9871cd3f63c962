"""lm-evaluation-harness on a machine without an accelerator; takes lm_eval's own arguments.

lm_eval's sglang backend asserts that its `device` is a CUDA device, and hands that on. Here
`sgl.Engine` starts on the CPU whatever the backend says; nothing else differs. With GPUs use
`lm_eval` itself.
"""

from typing import Any

import sglang
from sglang.srt.entrypoints.engine import Engine


class CpuEngine(Engine):
    def __init__(self, **keywords: Any) -> None:
        super().__init__(**{**keywords, "device": "cpu"})


def main() -> None:
    from lm_eval.__main__ import cli_evaluate  # not above: SGLang's processes import this file

    sglang.Engine = CpuEngine
    cli_evaluate()


if __name__ == "__main__":  # SGLang spawns its processes
    main()
