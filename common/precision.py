"""Which number format a device computes in, where a config asks for bfloat16 and the device has no instructions for it."""

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself: CPUs from AVX-512 on (some Arm ones), GPUs from Ampere on.

    Others emulate it; a CPU is then a hundred times slower than in float32.
    """
    if device.type == "cpu":
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def working_precision(precision: str, device: torch.device) -> str:
    """The precision (float32, bfloat16, float16) that is computed in where one is asked for: float32 for emulated bfloat16."""
    return "float32" if precision == "bfloat16" and not has_bfloat16(device) else precision


def tell_precision(precision: str, device: torch.device) -> None:
    """Print a line where the working precision is another than was asked for."""
    if working_precision(precision, device) != precision:
        print(f"note: this {device.type.upper()} has no {precision} arithmetic; float32 is used instead", flush=True)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The forward pass in its working precision; float16 needs a scaled loss."""
    working = working_precision(precision, device)
    return torch.autocast(device.type, getattr(torch, working), enabled=working != "float32")
