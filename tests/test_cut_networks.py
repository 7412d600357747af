"""Models of torchvision, timm and transformers as they come: how many blocks they have, and that these train by themselves."""

import pytest
import torch
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
    ("timm", "poolformer_s12", "block", 16, 32),
    ("timm", "ghostnet_050", "block", 19, 32),
    ("timm", "hrnet_w18_small", "block", 5, 64),
    ("torchvision", "mobilenet_v3_small", "block", 13, 32),
    ("torchvision", "resnet18", "layer", 17, 32),
    ("torchvision", "resnet18", "stage", 4, 64),
    ("torchvision", "densenet121", "block", 8, 32),
    ("timm", "pit_ti_224", "block", 13, 64),
    ("timm", "resnetv2_50", "stage", 4, 64),
    ("timm", "seresnet18", "layer", 17, 32),
    ("timm", "regnetx_002", "stage", 5, 64),
    ("timm", "levit_128s", "block", 12, 224),
    ("timm", "pvt_v2_b0", "block", 12, 64),
    ("timm", "fastvit_t8", "block", 17, 64),
    ("timm", "repvit_m0_9", "block", 24, 32),
    ("timm", "starnet_s050", "block", 11, 32),
    ("timm", "tinynet_e", "block", 12, 32),
    ("timm", "lcnet_035", "block", 15, 32),
    ("timm", "hardcorenas_a", "block", 14, 32),
    ("timm", "nf_resnet26", "block", 9, 32),
    ("timm", "eca_resnext26ts", "block", 9, 32),
    ("timm", "gcresnet33ts", "block", 12, 32),
    ("timm", "vit_tiny_patch16_224", "block", 13, 32),
    ("timm", "deit_tiny_patch16_224", "block", 13, 32),
    ("timm", "mixer_s32_224", "block", 9, 64),
    ("timm", "inception_next_atto", "block", 16, 32),
    ("timm", "mambaout_femto", "block", 22, 32),
    ("timm", "efficientvit_b0", "block", 11, 64),
    ("timm", "swiftformer_xs", "block", 21, 224),
    ("timm", "ese_vovnet19b_slim", "block", 7, 32),
    ("timm", "nextvit_small", "block", 24, 64),
    ("timm", "tiny_vit_5m_224", "block", 16, 64),
    ("timm", "resnest14d", "block", 7, 32),
    ("timm", "legacy_seresnet18", "block", 9, 32),
    ("timm", "gernet_s", "block", 16, 32),
    ("timm", "rexnet_100", "block", 18, 32),
    ("timm", "mobileone_s0", "block", 43, 32),
    ("timm", "hgnet_tiny", "block", 7, 32),
    ("timm", "dla34", "block", 4, 64),
    ("timm", "test_resnet", "block", 7, 32),
    ("timm", "test_convnext", "block", 13, 32),
    ("timm", "test_efficientnet", "block", 7, 32),
    ("timm", "test_nfnet", "block", 9, 32),
    ("timm", "test_mambaout", "block", 8, 32),
]


def build(library, name, size, classes=10):
    torch.manual_seed(0)
    if library == "torchvision":
        options = {"init_weights": False} if name == "googlenet" else {}
        return getattr(import_torchvision().models, name)(num_classes=classes, **options)
    import_torchvision()
    timm = pytest.importorskip("timm")
    if name.startswith(("vit_", "pit_", "mixer", "deit")):
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
