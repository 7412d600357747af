"""fastff: convolutional networks trained block by block with the Scalable Forward-Forward algorithm."""
