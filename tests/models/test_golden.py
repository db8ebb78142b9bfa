"""Outputs and gradients recorded from the original implementation, for every model case that is there."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import src
from src.models.heads import EntityChoiceModel, SpanClassificationModel

TOLERANCE = 2e-5
SHARED = Path(os.environ.get("LEANALBERT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
HERE = Path(__file__).with_name("golden")  # the smallest case, so that nobody needs the others to see the numbers agree
CASES = {path.stem: path.parent for folder in (SHARED / "golden", HERE) for path in folder.glob("model_*.json")}


class Case:
    """One recorded case: its model with the recorded parameters, inputs, and expected values."""

    def __init__(self, directory, name):
        self.facts = json.loads((directory / f"{name}.json").read_text())
        tensors = load_file(directory / f"{name}.safetensors")
        self.parameters, self.inputs, self.outputs, self.gradients = (
            {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            for prefix in ("param/", "input/", "output/", "grad/")
        )

    def state_dict(self):
        aliases = self.facts["aliases"]
        return {key: self.parameters[aliases.get(key, key)] for key in self.facts["state_dict_keys"]}

    def build(self):
        config = src.LeanAlbertConfig(
            **self.facts["config"], tie_word_embeddings=self.facts.get("tied_decoder") is not False
        )
        heads = {"SpanClassificationModel": SpanClassificationModel, "EntityChoiceModel": EntityChoiceModel}
        if self.facts["model"] in heads:
            return heads[self.facts["model"]](src.LeanAlbertModel(config)).eval()
        return getattr(src, self.facts["model"])(config).eval()


@pytest.fixture(params=sorted(CASES))
def case(request):
    return Case(CASES[request.param], request.param)


def test_all_cases_are_there(golden_dir):
    assert len(CASES) >= 14, f"{golden_dir} is not complete"


@pytest.fixture
def loaded(case):
    model = case.build()
    model.load_state_dict(case.state_dict(), strict=True)
    return model


def assert_recorded(actual, expected, name):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0, msg=lambda text: f"{name}: {text}")


def test_golden_names_match(case):
    model = case.build()
    assert list(model.state_dict()) == case.facts["state_dict_keys"]
    assert [name for name, _ in model.named_parameters()] == case.facts["named_parameters"]


def test_golden_outputs_match(case, loaded):
    outputs = loaded(**case.inputs)
    compared = {name: outputs[name] for name in case.outputs.keys() & outputs.keys()}
    if hasattr(loaded, "predictions"):
        encoder_inputs = [case.inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")]
        encoded = loaded.albert(*encoder_inputs)
        compared |= {name: encoded[name] for name in ("last_hidden_state", "pooler_output")}
        without_order = {name: value for name, value in case.inputs.items() if name != "sentence_order_label"}
        compared["loss_without_sop"] = loaded(**without_order).loss
        compared["prediction_logits_ids_only"] = loaded(case.inputs["input_ids"]).prediction_logits
        compared["embedding_output"] = loaded.albert.embeddings(encoder_inputs[0], encoder_inputs[2])
    assert case.outputs.keys() <= compared.keys()
    for name, expected in case.outputs.items():
        assert_recorded(compared[name], expected, name)


def test_golden_gradients_match(case, loaded):
    if not case.gradients:
        pytest.skip("no gradients recorded for this case")
    loaded(**case.inputs).loss.backward()
    gradients = {name: parameter.grad for name, parameter in loaded.named_parameters()}
    without = set(case.facts.get("parameters_without_grad", []))
    assert {name for name, gradient in gradients.items() if gradient is None} == without
    assert gradients.keys() - without == case.gradients.keys()
    for name, expected in case.gradients.items():
        assert_recorded(gradients[name] / expected.abs().max(), expected / expected.abs().max(), name)
