"""What a run ran on. In metrics/, where a diff shows a change."""

import importlib.metadata
import platform

PACKAGES = ("torch", "transformers", "sentence-transformers", "accelerate", "datasets", "tokenizers", "numpy")


def describe(*packages: str) -> dict[str, str | int]:
    """Versions, of these packages too, and what else moves a score in its last digits: device and processor."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    instructions = torch.backends.cpu.get_cpu_capability() + (" BF16" if processor_has_bf16() else "")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in (*PACKAGES, *packages)},
        "device": torch.cuda.get_device_name() if device and device.type == "cuda" else str(device or "cpu"),
        "processor": f"{platform.machine()} {instructions}",
        "threads": torch.get_num_threads(),
    }


def processor_has_bf16() -> bool:
    """Whether it multiplies in bf16, rather than having it emulated; not if ATEN_CPU_CAPABILITY holds torch to AVX2."""
    import torch

    instructions = torch.backends.cpu.get_cpu_capability()
    return instructions == "AVX512" and torch.cpu.get_capabilities().get("avx512_bf16", False)
