"""What torch.jit.script(), which compiles Python source and does not know fastnn's functions, answers."""


def refuse_script(module):
    """Called by torch.jit.script before it compiles a module."""
    raise RuntimeError(
        f"torch.jit.script cannot compile fastnn's {type(module).__name__}: use torch.jit.trace or torch.export, "
        "or script fastnn.revert(copy.deepcopy(model)), which holds torch's layers alone"
    )
