"""The projection of a ColBERT: its layers, and their files."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training import config as settings
from training.files import read_json, write_json


class Layer(nn.Module):
    """`activation(W x + b)`, with a residual x (or R x, where the sizes differ)."""

    def __init__(self, inputs: int, outputs: int, bias: bool, activation: nn.Module, residual: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.activation = activation
        self.has_residual = residual
        self.residual = nn.Linear(inputs, outputs, bias=False) if residual and inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.linear(x))
        if self.has_residual:
            y = y + (x if self.residual is None else self.residual(x))
        return y


def build_head(head: settings.Head, hidden: int, dimension: int) -> nn.Sequential:
    widths = head.widths or [2 * hidden, dimension]
    if widths[-1] != dimension:
        raise settings.ConfigError(f"model.head.widths ends with {widths[-1]}, but model.dimension is {dimension}")
    residual = head.residual if isinstance(head.residual, list) else [head.residual] * len(widths)
    if len(residual) != len(widths):
        raise settings.ConfigError(f"model.head.residual has {len(residual)} entries; want {len(widths)}, one a layer")
    last = len(widths) - 1
    sizes = zip([hidden, *widths], widths, residual, strict=False)
    return nn.Sequential(
        *(
            Layer(inputs, outputs, head.bias, activation("Identity" if n == last else head.activation), skip)
            for n, (inputs, outputs, skip) in enumerate(sizes)
        )
    )


def activation(name: str) -> nn.Module:
    found = getattr(nn, name.rsplit(".", 1)[-1], None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise settings.ConfigError(f"model.head.activation is {name!r}; want a class of torch.nn, such as SiLU")
    return found()


def save_layer(layer: Layer, folder: Path) -> None:
    kind = type(layer.activation)
    facts = {
        "in_features": layer.linear.in_features,
        "out_features": layer.linear.out_features,
        "bias": layer.linear.bias is not None,
        "activation_function": f"{kind.__module__}.{kind.__name__}",
        "use_residual": layer.has_residual,
    }
    write_json(folder / "config.json", facts)
    weights = {name: tensor.contiguous().cpu() for name, tensor in layer.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load_layer(folder: Path) -> Layer:
    facts = read_json(folder / "config.json")
    function = activation(facts.get("activation_function", "Tanh"))
    sizes = facts["in_features"], facts["out_features"]
    layer = Layer(*sizes, facts.get("bias", True), function, facts.get("use_residual", False))
    layer.load_state_dict(load_file(folder / "model.safetensors"))
    return layer.float()
