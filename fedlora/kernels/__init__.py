"""What PyTorch does in many passes over a GPU's memory, in fewer: by Triton kernels, and by sums inside products.

Where they do not apply, the work is left to PyTorch.
"""

from torch import nn

from fedlora.kernels.activations import use_activation_kernels
from fedlora.kernels.attention import use_short_attention
from fedlora.kernels.norms import use_norm_kernels
from fedlora.kernels.products import share_inputs
from fedlora.kernels.rotary import use_rotary_kernel


def use_kernels(model: nn.Module) -> None:
    """Let a transformers model on a GPU compute by this package's kernels, where they carry what it computes."""
    use_short_attention(model)
    use_norm_kernels(model)
    use_rotary_kernel(model)
    use_activation_kernels(model)
    share_inputs(model)
