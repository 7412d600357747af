"""Models of torchvision, timm and transformers as they come: how many blocks they have, and that these train by themselves."""

import copy

import pytest
import torch
from torch import nn
from vision import import_torchvision

import fastff
from fastff import SFF

# (library, model, granularity, blocks, size of the images)
NETWORKS = [
    ("torchvision", "shufflenet_v2_x0_5", "block", 18, 32),
    ("torchvision", "mnasnet0_5", "block", 20, 32),
    ("torchvision", "squeezenet1_1", "block", 9, 64),
    ("torchvision", "regnet_x_400mf", "block", 23, 32),
    ("torchvision", "googlenet", "block", 12, 64),
    ("torchvision", "resnet18", "block", 9, 32),
    ("torchvision", "mobilenet_v2", "block", 19, 32),
    ("timm", "regnetx_002", "block", 14, 32),
    ("timm", "dpn48b", "block", 17, 32),
    ("timm", "seresnet18", "block", 9, 32),
    ("timm", "skresnet18", "block", 9, 32),
    ("timm", "cspresnet50", "block", 16, 32),
    ("timm", "mobilevit_xxs", "block", 12, 64),
    ("timm", "convnext_atto", "block", 16, 32),
    ("timm", "efficientnet_lite0", "block", 18, 32),
    ("timm", "mobilenetv4_conv_small", "block", 19, 32),
    ("timm", "edgenext_xx_small", "block", 16, 64),
    ("timm", "poolformer_s12", "block", 16, 64),
    ("timm", "ghostnet_050", "block", 19, 32),
    ("timm", "hrnet_w18_small", "block", 5, 64),
]


def build(library, name, size, classes=10):
    torch.manual_seed(0)
    if library == "torchvision":
        options = {"init_weights": False} if name == "googlenet" else {}
        return getattr(import_torchvision().models, name)(num_classes=classes, **options)
    import_torchvision()
    timm = pytest.importorskip("timm")
    if any(word in name for word in ("vit_", "pit_", "mixer", "deit", "cait", "xcit")):
        return timm.create_model(name, num_classes=classes, img_size=size)
    return timm.create_model(name, num_classes=classes)


@pytest.mark.parametrize(("library", "name", "granularity", "blocks", "size"), NETWORKS)
def test_networks_train_block_by_block(library, name, granularity, blocks, size):
    model = build(library, name, size)
    names = list(model.state_dict())
    sff = SFF(model, 10, granularity, (3, size, size), readout=True, window=1)
    assert len(sff.blocks) == blocks
    assert all(any(p.requires_grad for p in block.parameters()) for block in sff.blocks)
    sff.train()
    images, target = torch.randn(3, 3, size, size), torch.tensor([0, 1, 2])
    alive = (images,)
    for i, block in enumerate(sff.local_blocks):  # each loss reaches its own block alone
        for parameter in model.parameters():
            parameter.grad = None
        visit = block.visit(alive, target)
        alive = visit.following
        assert not any(t.requires_grad for t in alive if isinstance(t, torch.Tensor))
        visit.backward()
        own = {id(p) for p in sff.blocks[i].parameters()}
        reached = {n for n, p in model.named_parameters() if p.grad is not None and id(p) not in own}
        assert not reached, f"block {i}: {reached}"
    assert len(alive[0]) == 3
    losses = fastff.Trainer(sff).step(images, target)
    assert torch.isfinite(losses).all()
    assert list(model.state_dict()) == names
