"""Models of torchvision, timm and transformers as they come: how many blocks they have, and that these train by themselves."""

import pytest
import torch
from vision import import_torchvision

from fastff import SFF
from fastff.nn import LocalBlock

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
    ("timm", "mobilevit_xxs", "block", 15, 64),
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
    ("timm", "test_resnet", "block", 7, 32),
    ("timm", "test_convnext", "block", 13, 32),
    ("timm", "test_efficientnet", "block", 7, 32),
    ("timm", "test_nfnet", "block", 9, 32),
    ("timm", "test_mambaout", "block", 8, 32),
    ("transformers", "ResNet", "block", 5, 32),
    ("transformers", "RegNet", "block", 6, 32),
    ("transformers", "ConvNext", "block", 7, 64),
    ("transformers", "PoolFormer", "block", 9, 64),
    ("transformers", "ViT", "block", 4, 32),
    ("transformers", "ViT", "stage", 1, 32),
    ("transformers", "Dinov2", "block", 4, 32),
    ("transformers", "Swin", "block", 5, 32),
    ("transformers", "Segformer", "block", 6, 64),
]


TOKENS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 2, 1]}
CONFIGURATIONS = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]},
    "RegNet": {"embedding_size": 8, "groups_width": 8, **STAGES},
    "ConvNext": STAGES,
    "PoolFormer": STAGES,
    "ViT": {"intermediate_size": 64, **TOKENS},
    "Dinov2": TOKENS,
    "Swin": {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1, 2],
        "num_heads": [1, 2, 2],
        "window_size": 4,
    },
    "Segformer": {"num_attention_heads": [1, 1, 2, 2], **STAGES},
}


def build(library, name, size, classes=10):
    torch.manual_seed(0)
    torchvision = import_torchvision()
    if library == "torchvision":
        options = {"init_weights": False} if name == "googlenet" else {}
        return getattr(torchvision.models, name)(num_classes=classes, **options)
    module = pytest.importorskip(library)
    if library == "transformers":
        configuration = getattr(module, f"{name}Config")(num_labels=classes, **CONFIGURATIONS[name])
        return getattr(module, f"{name}ForImageClassification")(configuration)
    if name.startswith(("vit_", "pit_", "mixer", "deit")):
        return module.create_model(name, num_classes=classes, img_size=size)
    return module.create_model(name, num_classes=classes)


@pytest.mark.parametrize(("library", "name", "granularity", "blocks", "size"), NETWORKS)
def test_networks_train_block_by_block(library, name, granularity, blocks, size):
    model = build(library, name, size)
    before = {key: value.clone() for key, value in [*model.state_dict().items(), *model.named_buffers()]}
    sff = SFF(model, 10, granularity, (3, size, size), readout=True, window=1, hidden=0)
    assert len(sff.blocks) == blocks
    assert all(any(p.requires_grad for p in block.parameters()) for block in sff.blocks)
    after = dict([*model.state_dict().items(), *model.named_buffers()])
    assert list(after) == list(before) and all(torch.equal(after[key], value) for key, value in before.items())
    sff.train()
    alive, target = (torch.randn(3, 3, size, size),), torch.tensor([0, 1, 2])
    for block in sff.local_blocks:
        buffers = [(b, b.clone()) for b in model.buffers()]
        plain = step(model, LocalBlock(block.module, block.head, block.normalize, fuse=False), alive, target)
        for buffer, value in buffers:
            buffer.copy_(value)
        alive, *fused = step(model, block, alive, target)
        for found, expected in zip((alive, *fused), plain, strict=True):
            assert_close(found, expected)
    assert len(alive[0]) == 3
    assert list(dict([*model.state_dict().items(), *model.named_buffers()])) == list(before)


def step(model, block, alive, target):
    """Train a block for one step. Returns what it hands on, its loss, its gradients, and all buffers; no other parameter has a gradient."""
    own = [*block.parameters()]
    for parameter in (*model.parameters(), *own):
        parameter.grad = None
    torch.manual_seed(0)
    visit = block.visit(alive, target)
    following, loss = visit.following, visit.step.loss
    assert torch.isfinite(loss).all()
    assert not any(t.requires_grad for t in following if isinstance(t, torch.Tensor))
    visit.backward()
    kept = {id(p) for p in own}
    reached = [name for name, p in model.named_parameters() if p.grad is not None and id(p) not in kept]
    assert not reached, f"{block.module.name}: {reached}"
    return following, [loss], [p.grad for p in own], [b.clone() for b in model.buffers()]


def assert_close(found, expected):
    """These tensors are close as a whole: the gradient of a bias in front of a batch norm is nothing but rounding."""
    values = [
        torch.cat([t.double().flatten() for t in side if isinstance(t, torch.Tensor)] or [torch.zeros(1)])
        for side in (found, expected)
    ]
    assert (values[0] - values[1]).norm() <= 2e-3 * values[1].norm()
