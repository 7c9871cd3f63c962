"""What SGLang calls, in every process it starts: registers, nothing else."""


def register() -> None:
    """Entry point of group `sglang.srt.plugins`; SGLang logs an exception and goes on without."""
    from sidp_sgl import runtime

    runtime.register()


def activate_cpu_platform() -> str | None:
    """Entry point of group `sglang.srt.platforms`: class path of the CPU platform, or None."""
    from sidp_sgl.sglang_hooks.cpu.platform import activate

    return activate()
