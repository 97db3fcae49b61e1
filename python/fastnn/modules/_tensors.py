"""A layer's tensors from the dictionaries that Module.__getattr__ finds them in: 0.1 us each instead of 0.5."""


def parameter(layer, name):
    """layer.name, also where something else has taken the parameter's place (a parametrization, pruning, a replica)."""
    held = layer._parameters
    return held[name] if name in held else getattr(layer, name)


def buffer(layer, name):
    """layer.name, also where a plain attribute has taken the buffer's place."""
    held = layer._buffers
    return held[name] if name in held else getattr(layer, name)
