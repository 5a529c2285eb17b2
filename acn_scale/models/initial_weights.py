"""The weights that a model begins with."""

import torch
from torch import nn

from acn_scale.models.layers import MLP, Attention
from acn_scale.models.patches import PatchEmbed


@torch.no_grad()
def initialize(model: nn.Module, scheme: str) -> None:
    """Set the initial weights of a whole model, in place. Joins keep the start that their pattern defines.

    scheme   linear, patches      embeddings, positions, class token    biases
    xavier   uniform (Glorot)     N(0, 0.02)                            0
    normal   N(0, 0.02)           N(0, 0.02)                            0
    torch    PyTorch's default    N(0, 1), as in the ACN authors' code  PyTorch's default

    identity: as xavier, but for the maps that a block without skips is made of, which begin as the identity where they
    are wide enough: W and its transpose of a random orthogonal W for an attention's values and projection, and
    [W; -W] and [W' -W'] for an MLP ("looks linear", Balduzzi et al. 2017, arXiv 1702.08591): GELU(x) - GELU(-x) = x.
    """
    std = 1.0 if scheme == "torch" else 0.02
    for name, module in model.named_modules():
        if "joins" in name.split("."):
            continue
        if isinstance(module, nn.Linear | nn.Conv2d) and scheme != "torch":
            weight = module.weight.view(len(module.weight), -1)
            if scheme == "normal":
                nn.init.normal_(weight, std=std)
            else:
                nn.init.xavier_uniform_(weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, PatchEmbed):
            for parameter in (module.cls_token, module.pos_embed):
                if parameter is not None:
                    nn.init.normal_(parameter, std=std)
    for module in model.modules() if scheme == "identity" else ():
        if isinstance(module, Attention):
            dim = len(module.proj.weight)
            nn.init.orthogonal_(module.proj.weight)
            module.qkv.weight[2 * dim :] = module.proj.weight.T
        elif isinstance(module, MLP):
            half, dim = len(module.fc1.weight) // 2, len(module.fc2.weight)
            weight = nn.init.orthogonal_(module.fc1.weight.new_empty(half, dim))
            module.fc1.weight[: 2 * half] = torch.cat([weight, -weight])
            module.fc2.weight[:, : 2 * half] = torch.cat([weight.T, -weight.T], dim=1)
