"""torch.fx records a layer of torch.nn as one node, and knows it by the name of its class's module: fastnn's ask."""

from torch.fx import Proxy

__all__ = ["Proxy", "one_node", "recorded"]


def recorded(layer, *inputs):
    """A call of `layer` as one node, whatever the tracer looks into."""
    tracer = inputs[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), inputs, {})


def one_node(layer, *inputs):
    """What a tracer makes of a call of `layer`, if it takes the layer's torch.nn original whole; otherwise None, and
    the tracer is to look into forward()."""
    kind, tracer = type(layer), inputs[0].tracer
    if not kind.__module__.startswith("fastnn."):  # tracers look into a subclass of torch.nn's too
        return None
    original = object.__new__(kind.__base__)
    original.__dict__ = layer.__dict__
    return recorded(layer, *inputs) if tracer.is_leaf_module(original, tracer.path_of_module(layer)) else None
