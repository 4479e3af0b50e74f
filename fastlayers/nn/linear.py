"""Linear layers with their activation in one op, and the two feed-forward blocks made of them."""

from torch import nn

from fastlayers import ops, reference


class FusedLinear(nn.Linear):
    """activation(x W' + b) in one op; state_dict of torch.nn.Linear.

    activation: identity, relu, gelu (erf), gelu_tanh, quick_gelu, silu, sigmoid, tanh, relu_squared, leaky_relu
    save:       what the backward keeps: "preactivation", or "input" to recompute it and save memory
    """

    activation = "identity"  # class attributes, so that a torch.nn.Linear becomes one by a change of class
    save = "preactivation"

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        activation="identity",
        *,
        save="preactivation",
        device=None,
        dtype=None,
    ):
        if activation not in reference.ACTIVATIONS:
            known = ", ".join(reference.ACTIVATIONS)
            raise ValueError(f"FusedLinear: activation {activation!r} is not one of {known}")
        if save not in ("preactivation", "input"):
            raise ValueError(f"FusedLinear: save has to be 'preactivation' or 'input', got {save!r}")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation = activation
        self.save = save

    def forward(self, input):
        return ops.linear_act(input, self.weight, self.bias, self.activation, save=self.save)

    def extra_repr(self):
        return f"{super().extra_repr()}, activation={self.activation}"


class FusedMLP(nn.Module):
    """fc2(dropout(activation(fc1(x)))), the feed-forward block of BERT and GPT-2."""

    def __init__(
        self,
        in_features,
        hidden_features,
        out_features=None,
        bias=True,
        activation="gelu",
        dropout=0.0,
        *,
        save="preactivation",
        device=None,
        dtype=None,
    ):
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.fc1 = FusedLinear(in_features, hidden_features, bias, activation, save=save, **place)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = FusedLinear(hidden_features, out_features or in_features, bias, **place)

    def forward(self, input):
        return self.fc2(self.dropout(self.fc1(input)))


class GatedMLP(nn.Module):
    """down_proj(activation(gate_proj(x)) * up_proj(x)), with the state_dict of Hugging Face's LlamaMLP.

    source  Shazeer 2020, "GLU variants improve transformer", arXiv:2002.05202
    """

    def __init__(
        self,
        in_features,
        hidden_features,
        out_features=None,
        bias=False,
        activation="silu",
        *,
        save="preactivation",
        device=None,
        dtype=None,
    ):
        if activation not in reference.ACTIVATIONS:
            known = ", ".join(reference.ACTIVATIONS)
            raise ValueError(f"GatedMLP: activation {activation!r} is not one of {known}")
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.gate_proj = FusedLinear(in_features, hidden_features, bias, save=save, **place)
        self.up_proj = FusedLinear(in_features, hidden_features, bias, **place)
        self.down_proj = FusedLinear(hidden_features, out_features or in_features, bias, **place)
        self.activation = activation
        self.save = save

    def forward(self, input):
        gate, up = self.gate_proj, self.up_proj
        hidden = ops.gated_linear_act(
            input, gate.weight, up.weight, gate.bias, up.bias, self.activation, save=self.save
        )
        return self.down_proj(hidden)

    def extra_repr(self):
        return f"activation={self.activation}"
