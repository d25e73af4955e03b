"""No regularizer: plain quantization-aware training."""

from brqat.regularizer.base import Regularizer


class NoRegularizer(Regularizer):
    """Acts on no site."""

    def __init__(self):
        super().__init__(lambda_br=0, lambda_br_act=0)
