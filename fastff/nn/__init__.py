"""Modules: the goodness head, and blocks that train themselves by a local loss inside any nn.Module."""

from fastff.nn.block import FFBlock, FFConv2d, FFDepthwiseConv2d, FFLinear, LocalBlock
from fastff.nn.group_head import GroupGoodness
from fastff.nn.head import GoodnessHead

__all__ = ["LocalBlock", "FFBlock", "FFConv2d", "FFDepthwiseConv2d", "FFLinear", "GoodnessHead", "GroupGoodness"]
