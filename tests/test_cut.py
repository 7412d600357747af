"""The cut: where blocks end, that blocks and classifier together are the model, and what stays alive through it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vision import import_torchvision

import fastff
from fastff import SFF
from fastff.graph.cut import CutError, cut

OWN = {
    "resnet18": lambda: fastff.models.resnet18(10, stem="cifar", width=8),
    "mobilenet_v3_small": lambda: fastff.models.mobilenet_v3_small(10, stem="cifar"),
    "mobilenet_v3_large": lambda: fastff.models.mobilenet_v3_large(10, stem="cifar"),
}
# torchvision's: (granularity, number of blocks, size of the images, further arguments)
VISION = [
    ("resnet18", "block", 9, 64, {}),
    ("resnet18", "layer", 17, 64, {}),
    ("vgg11_bn", "block", 8, 32, {}),
    ("densenet121", "block", 8, 64, {}),
    ("densenet121", "layer", 62, 64, {}),
    ("efficientnet_b0", "block", 18, 64, {}),
    ("mobilenet_v3_large", "block", 17, 64, {}),
    ("convnext_tiny", "block", 22, 64, {}),
    ("vit_b_16", "block", 13, 32, {"image_size": 32}),
    ("swin_t", "block", 16, 64, {}),
    ("googlenet", "block", 12, 64, {"aux_logits": False, "init_weights": False}),
]


def run(blocks, classifier, images):
    """(the model's output by way of the blocks, the number of tensors alive after each block)."""
    alive, counts = (images,), []
    for block in blocks:
        alive = block(*alive)
        counts.append(len(alive))
    return (classifier(*alive)[0] if classifier is not None else alive[0]), counts


def assert_same_network(model, blocks, classifier, images):
    """In evaluation and in training, dropout included; buffers change alike."""
    for training in (False, True):
        model.train(training)
        twin = copy.deepcopy(model)
        torch.manual_seed(3)
        want = twin(images)
        torch.manual_seed(3)
        got, counts = run(blocks, classifier, images)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.detach().abs().max()))
        for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    return counts


@pytest.mark.parametrize(
    ("name", "granularity", "blocks"),
    [("resnet18", "block", 9), ("resnet18", "layer", 17), ("resnet18", "stage", 4), ("resnet18", "model", 1)]
    + [("mobilenet_v3_small", "block", 13), ("mobilenet_v3_large", "block", 17), ("mobilenet_v3_small", "layer", 34)],
)
def test_own_models(name, granularity, blocks):
    torch.manual_seed(0)
    model = OWN[name]()
    found, classifier = cut(model, granularity, (3, 32, 32))
    assert len(found) == blocks
    counts = assert_same_network(model, found, classifier, torch.randn(2, 3, 32, 32))
    if name == "resnet18" and granularity == "layer":
        assert counts == [1, *[2, 1] * 8], "inside a residual block its shortcut is alive as well"
    elif granularity != "layer":
        assert set(counts) == {1}


@pytest.mark.parametrize(("name", "granularity", "blocks", "size", "options"), VISION)
def test_torchvision_models(name, granularity, blocks, size, options):
    torchvision = import_torchvision()
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10, **options)
    for (
        module
    ) in model.modules():  # stochastic depth draws in the order of calls, which the blocks keep, but two runs must not
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    found, classifier = cut(model, granularity, (3, size, size))
    assert len(found) == blocks
    assert_same_network(model, found, classifier, torch.randn(2, 3, size, size))


def test_every_parameter_belongs_to_one_block():
    for name, make in OWN.items():
        for granularity in ("layer", "block", "stage"):
            model = make()
            sff = SFF(model, 10, granularity)
            owned = [p for block in sff.blocks for p in block.parameters()]
            assert len(owned) == len(set(owned))
            rest = {n for n, p in model.named_parameters() if not any(p is o for o in owned)}
            assert all(n.startswith(("fc", "classifier")) for n in rest), (name, granularity, rest)


def test_names_and_parameters_are_the_models():
    model = OWN["resnet18"]()
    names, pointers = list(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    sff = SFF(model, 10)
    assert list(model.state_dict()) == names
    assert [p.data_ptr() for p in sff.model.parameters()] == pointers
    assert [n.removeprefix("model.") for n in sff.state_dict() if n.startswith("model.")] == names
    assert all(n.startswith(("model.", "heads.")) for n in sff.state_dict())
    other = OWN["resnet18"]()
    other.load_state_dict(sff.model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    model.eval()
    other.eval()
    torch.testing.assert_close(run(*cut(model, "block", (3, 32, 32)), images)[0], other(images))


def test_squeeze_excite_belongs_to_the_layer_it_scales():
    model = OWN["mobilenet_v3_small"]()
    blocks = SFF(model, 10, "layer").blocks
    owner = {p: i for i, block in enumerate(blocks) for p in block.parameters()}
    gates = [m for m in model.modules() if hasattr(m, "fc1")]
    assert len(gates) == 9
    for residual in model.features[1:-1]:
        depthwise = [m for m in residual.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        for gate in (m for m in residual.modules() if hasattr(m, "fc1")):
            assert {owner[p] for p in gate.parameters()} == {owner[depthwise[0].weight]}


class ReadsTraining(nn.Module):
    """Functional dropout, an `if` on the mode, a shared module, in-place operations and a shortcut across them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.relu(self.first(x))
        shortcut = x
        x = F.dropout(self.second(x), 0.5, training=self.training)
        x = self.relu(x)
        x += shortcut
        if self.training:
            x = x * 3
        x = self.relu(self.second(x))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("granularity", ["layer", "block", ["first", "second"]])
def test_training_mode_is_followed(granularity):
    torch.manual_seed(0)
    model = ReadsTraining()
    blocks, classifier = cut(model, granularity, (3, 8, 8))
    assert len(blocks) > 1
    images = torch.randn(2, 3, 8, 8)
    assert_same_network(model, blocks, classifier, images)
    model.eval()
    once = run(blocks, classifier, images)[0]
    assert torch.equal(run(blocks, classifier, images)[0], once)
    model.train()
    assert not torch.equal(run(blocks, classifier, images)[0], run(blocks, classifier, images)[0]), "dropout is frozen"


def test_forward_hooks_fire():
    model, seen = OWN["resnet18"](), []
    model.layer1[0].register_forward_hook(lambda module, args, out: seen.append("block"))
    model.layer2[0].conv1.register_forward_hook(lambda module, args, out: seen.append("conv"))
    sff = SFF(model, 10)
    seen.clear()
    sff(torch.randn(2, 3, 32, 32))
    assert seen == ["block", "conv"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_models_of_other_types(dtype, when):
    torch.manual_seed(0)
    model = OWN["resnet18"]().to(memory_format=torch.channels_last)
    sff = SFF(model.to(dtype), 10, "block") if when == "before" else SFF(model, 10, "block").to(dtype)
    images = torch.randn(2, 3, 32, 32, dtype=dtype).contiguous(memory_format=torch.channels_last)
    for output, goodness in sff.outputs(images):
        assert output.dtype == dtype
        assert goodness.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert output.is_contiguous(memory_format=torch.channels_last)
    losses = fastff.Trainer(sff).step(images, torch.tensor([1, 2]))
    assert torch.isfinite(losses).all()


def test_a_copy_trains_alone():
    sff = SFF(OWN["resnet18"](), 10)
    twin = copy.deepcopy(sff)
    before = [p.detach().clone() for p in sff.parameters()]
    fastff.Trainer(twin).step(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    assert all(map(torch.equal, sff.parameters(), before))
    assert not all(map(torch.equal, twin.heads.parameters(), before[-len(list(sff.heads.parameters())) :]))


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*(nn.Sequential(nn.Conv2d(c, 4, 3), nn.ReLU()) for c in (3, 4)))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.body(x)
        if x.mean() > 1e9:
            x = x / 2
        return self.fc(x.mean((2, 3)))


def test_a_model_that_cannot_be_traced():
    """The error has the line, the module, and the way out."""
    with pytest.raises(CutError) as caught:
        SFF(DataDependent(), 3, input_shape=(3, 8, 8))
    text = str(caught.value)
    assert "if x.mean() > 1e9" in text
    assert "DataDependent" in text
    assert "granularity=[path, ...]" in text
    model = DataDependent()
    sff = SFF(model, 3, ["body.0", "body.1"], input_shape=(3, 8, 8))
    assert len(sff.blocks) == 2
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(sff.blocks[1](*sff.blocks[0](images))[0], model.body(images))


def test_paths_that_do_not_exist_name_their_neighbours():
    with pytest.raises(ValueError, match=r"layer1\.0"):
        SFF(OWN["resnet18"](), 10, ["layer1.0.", "layer2.1"])
    sff = SFF(OWN["resnet18"](), 10, ["layer1", "layer3"])
    assert [block.output_shape for block in sff.blocks] == [(8, 32, 32), (32, 8, 8)]


def test_print_shows_the_cut():
    text = repr(SFF(OWN["resnet18"](), 10, "block", readout=True))
    lines = text.splitlines()
    assert lines[0].startswith("SFF: ResNet in 9 blocks (block), 10 classes, ")
    assert lines[1].split() == ["block", "modules", "parameters", "output", "goodness", "epilogue"]
    assert len(lines) == 12
    assert "layer4.1" in lines[10]
    assert "64 x 4 x 4" in lines[10]
    assert lines[10].endswith("batch norm + residual + relu")
    assert "window=2, vote=weighted, grid=4, hidden=64, normalize=layer_norm, read-out kept" in lines[11]
    assert "tails" not in repr(SFF(OWN["resnet18"](), 10, window=1))


@pytest.mark.parametrize("vote", ["weighted", "softmax", "goodness", "last"])
def test_predict_leaves_early(vote):
    torch.manual_seed(0)
    sff = SFF(OWN["resnet18"](), 10, "block", vote=vote).eval()
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        goodness, whole = sff.goodness(images), sff(images)
    label, confidence, block = sff.predict(images)
    assert torch.equal(label, whole.argmax(1))
    assert block.tolist() == [8] * 16
    assert ((confidence > 0) & (confidence <= 1)).all()
    threshold = float(sff.predict(images).confidence.median())
    label, confidence, block = sff.predict(images, exit_threshold=threshold)
    assert block.min() < 8
    for i in range(16):
        so_far = sff.votes([g[i : i + 1] for g in goodness[: int(block[i]) + 1]])
        assert int(label[i]) == int(so_far.argmax())
        assert int(block[i]) == 8 or float(confidence[i]) >= threshold
    empty = sff.predict(images[:0])
    assert [len(t) for t in empty] == [0, 0, 0]


def test_transformer_blocks_are_trained_on_tokens():
    torchvision = import_torchvision()
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=5)
    sff = SFF(vit, 5, input_shape=(3, 16, 16), granularity="block")
    assert {head.channel_dim for head in sff.heads[1:]} == {-1}
    trainer = fastff.Trainer(sff)
    images, target = torch.randn(8, 3, 16, 16), torch.randint(5, (8,))
    losses = torch.stack([trainer.step(images, target) for _ in range(12)])
    assert (losses[-1] < losses[0]).all()
