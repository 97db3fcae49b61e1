"""Fake kernels of the optimizer steps and of gradient clipping."""

import torch


@torch.library.register_fake("fastnn::adam_step_")
@torch.library.register_fake("fastnn::yogi_step_")
@torch.library.register_fake("fastnn::sgd_step_")
@torch.library.register_fake("fastnn::adagrad_step_")
@torch.library.register_fake("fastnn::rmsprop_step_")
@torch.library.register_fake("fastnn::adadelta_step_")
@torch.library.register_fake("fastnn::scale_grads_")
def _in_place(*args):
    return None


@torch.library.register_fake("fastnn::grads_total_norm")
def _total_norm(grads, norm_type):
    return grads[0].new_empty(())
