"""The number format that our default precision means on this machine.

Targets at the default precision are about machines that compute in bfloat16. Elsewhere the same work runs in float32, and is
held to what does not depend on the format: fewer voxels computed twice, and no slower than the reference.
"""

import torch

from common.precision import working_precision

DEFAULT = getattr(torch, working_precision("bfloat16", torch.device("cpu")))
COMPUTES_BFLOAT16 = torch.bfloat16 == DEFAULT
