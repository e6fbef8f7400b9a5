"""The configuration of a VesperLM for transformers: Llama's, with more activations.

Written by vesper-model beside the weights; https://docs.rs/vesper-model. MIT or Apache-2.0.
"""
from transformers import LlamaConfig


class VesperConfig(LlamaConfig):
    """`hidden_act` is a name, or `{"era": {form: parameters}}`: see `Activation` in modeling_vesper.py."""

    model_type = "vesper"

    def __init__(self, hidden_act="silu", bos_token_id=None, eos_token_id=None, adapter=None, **kwargs):
        if adapter is not None:
            raise ValueError("config.json: adapter: merge the adapters into the weights first")
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)
        # Llama's own `hidden_act` must be a name that it knows: it stays silu, and is replaced in the model.
        self.activation = hidden_act

    def to_dict(self):
        fields = super().to_dict()
        fields["hidden_act"] = fields.pop("activation", "silu")
        return fields
