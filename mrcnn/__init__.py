"""A complete, trainable Mask R-CNN whose detection ops are the Triton kernels of `kernels`."""
