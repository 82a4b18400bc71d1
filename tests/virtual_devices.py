"""The environment of a process that has several CPU devices."""

import os


def environment(devices: int, **variables: str) -> dict[str, str]:
    """That of this process, with `devices` virtual ones."""
    count = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}".strip(),
        **variables,
    }
