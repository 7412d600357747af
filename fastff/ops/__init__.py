"""The ops: schema, plan (which algorithm, why), dispatch and autograd, one file per op. Users call fastff.functional."""

from fastff.ops import depthwise, goodness, layer_norm, tail

TABLES = {"goodness": goodness.ROWS, "tail": tail.ROWS, "layer_norm": layer_norm.ROWS, "depthwise": depthwise.ROWS}
