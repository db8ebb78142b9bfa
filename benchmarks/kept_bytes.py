"""Counts what autograd keeps between forward and backward."""

from unittest import mock

from torch.autograd.graph import saved_tensors_hooks

from src.models.recompute import RecomputedTensor


def kept_bytes(forward, parameters):
    """Bytes kept for the backward pass by forward(), which returns a tensor; each storage counts once, and those of
    the parameters not at all."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = {}

    def remember(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # holding the tensor keeps its address taken
        return tensor

    pack = RecomputedTensor.pack  # its hooks hide from ours what they keep

    def pack_and_remember(self, tensor):
        packed = pack(self, tensor)
        return remember(packed) if packed is tensor else packed

    with (
        saved_tensors_hooks(remember, lambda tensor: tensor),
        mock.patch.object(RecomputedTensor, "pack", pack_and_remember),
    ):
        outputs = forward()
    assert outputs.requires_grad
    return sum(num_bytes for num_bytes, _ in kept.values())
