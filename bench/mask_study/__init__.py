"""A study of the mask loss: three arms that differ in `model.mask_loss` alone, paired by seed."""
