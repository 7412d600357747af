"""The ops: schema, plan (which algorithm, why), dispatch and autograd, one file per op. Users call fastff.functional."""

from fastff.ops import convolution, depthwise, epilogue, goodness, group_goodness, group_tail, layer_norm, tail

TABLES = {
    "goodness": goodness.ROWS,
    "group_goodness": group_goodness.ROWS,
    "tail": tail.ROWS,
    "group_tail": group_tail.ROWS,
    "epilogue": epilogue.ROWS,
    "layer_norm": layer_norm.ROWS,
    "convolution": convolution.ROWS,
    "depthwise": depthwise.ROWS,
}
