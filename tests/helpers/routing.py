"""What a router's losses say of a single layer."""

from mindspore import ops


def one_layer(losses, *inputs):
    """What `losses` gives for one layer's probs, logits, counts and taken, and for valid tokens."""
    *layer, valid_T = inputs
    return tuple(one[0] for one in losses(*[ops.expand_dims(each, 0) for each in layer], valid_T))
