"""What SGLang calls, in every process it starts: registers, nothing else."""

import os


def register() -> None:
    """Entry point of group `sglang.srt.plugins`.

    SGLang logs an exception and goes on without the plugin; a process of an engine with --sidp
    must not.
    """
    try:
        from sidp_sgl import runtime

        runtime.register()
    except Exception as error:
        if group := os.environ.get("SIDP_GROUP"):
            from sidp_sgl.scheduler.lifecycle.liveness import give_up

            give_up(group, None, error)
        raise


def activate_cpu_platform() -> str | None:
    """Entry point of group `sglang.srt.platforms`: class path of the CPU platform, or None."""
    from sidp_sgl.sglang_hooks.cpu.platform import activate

    return activate()
