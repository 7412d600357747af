"""The ops: schema, plan (which algorithm, why), dispatch and autograd, one file per op. Users call fastff.functional."""

from fastff.ops import convolution, depthwise, epilogue, goodness, group_goodness, muon, step

__all__ = ["TABLES", "step"]

TABLES = {
    "goodness": goodness.ROWS,
    "goodness_step": goodness.STEP_ROWS,
    "group_goodness": group_goodness.ROWS,
    "epilogue": epilogue.ROWS,
    "layer_norm": group_goodness.ROWS,
    "convolution": convolution.ROWS,
    "depthwise": depthwise.ROWS,
    "muon": muon.ROWS,
}
