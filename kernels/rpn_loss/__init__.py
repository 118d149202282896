"""RPN loss: binary cross-entropy and smooth L1 of the anchors drawn, without gathering or encoding the others."""

from .op import rpn_loss

__all__ = ["rpn_loss"]
