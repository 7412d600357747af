"""The kernels behind fastff.ops, one file per operator and kind."""
