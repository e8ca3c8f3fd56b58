"""Linear layers with their weight in the device's best form, and the embedding that shares one."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops.linear.launch import pack


class PackedLinear(nn.Module):
    """Computes what `source` computes. `op` holds the weight, which is no parameter: it may be opaque to all else."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.in_features = source.in_features
        self.out_features = source.out_features
        self.op = pack(source.weight.data, None if source.bias is None else source.bias.data)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.op(x)


class SharedEmbedding(nn.Module):
    """The embedding of a model whose head has the same weight: its rows are read from the head's form of it."""

    def __init__(self, head: PackedLinear) -> None:
        super().__init__()
        self._op = head.op

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., in_features of the head]."""
        rows = self._op.rows(ids)
        assert rows is not None
        return rows


def pack_linears(model: nn.Module) -> bool:
    """Replace every plain nn.Linear in place, and embeddings that share a weight with one whose form is another now.

    Gives whether all of these weights lie in other memory now.
    """
    packed: dict[int, PackedLinear] = {}
    moved = True
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                packed[id(child.weight)] = PackedLinear(child)
                setattr(parent, name, packed[id(child.weight)])
                moved = moved and child.weight.data_ptr() not in packed[id(child.weight)].op.memory()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Embedding and id(child.weight) in packed:
                head = packed[id(child.weight)]
                if head.op.rows(child.weight.new_zeros(1).long()) is not None:
                    setattr(parent, name, SharedEmbedding(head))
    return moved


def packed_memory(model: nn.Module) -> dict[int, int]:
    """Where the weights of packed linears lie: address -> bytes."""
    memory: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, PackedLinear):
            memory |= module.op.memory()
    return memory
